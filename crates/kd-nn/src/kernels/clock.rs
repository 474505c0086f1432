//! The clock of the profile: off, it costs one load a kernel.
//!
//! Every kernel goes through [`Level::run`](super::Level), which times it here and asks it for its [`Cost`]. Time is booked on the place
//! (network, layer, pass) that the thread is at; threads that help get the place of the one that called them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

/// What a kernel does, as far as it is worth counting.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cost {
    /// Additions and multiplications, as they are really done.
    pub flops: usize,
    /// Floats read and written, wherever they are.
    pub floats: usize,
}

/// A layer in one direction.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub network: String,
    pub layer: String,
    pub pass: &'static str,
}

/// What was booked: on a kernel, or under `None` on the layer as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Booked {
    pub calls: u64,
    pub seconds: f64,
    pub flops: f64,
    pub floats: f64,
}

type Account = BTreeMap<(usize, Option<&'static str>), Booked>;

static ON: AtomicBool = AtomicBool::new(false);
static PLACES: Mutex<Vec<Place>> = Mutex::new(vec![]);

/// The accounts of all threads that ever had one.
fn accounts() -> &'static Mutex<Vec<Arc<Mutex<Account>>>> {
    static ALL: OnceLock<Mutex<Vec<Arc<Mutex<Account>>>>> = OnceLock::new();
    ALL.get_or_init(Mutex::default)
}

thread_local! {
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
    static OWN: RefCell<Option<Arc<Mutex<Account>>>> = const { RefCell::new(None) };
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

pub(crate) fn on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Begins anew.
pub(crate) fn start() {
    lock(accounts()).iter().for_each(|a| lock(a).clear());
    ON.store(true, Ordering::Relaxed);
}

/// Ends, and returns everything booked.
pub(crate) fn stop() -> Vec<(Place, Option<&'static str>, Booked)> {
    ON.store(false, Ordering::Relaxed);
    let places = lock(&PLACES).clone();
    let mut all = Account::new();
    for account in lock(accounts()).iter() {
        for (key, booked) in std::mem::take(&mut *lock(account)) {
            let sum = all.entry(key).or_default();
            sum.calls += booked.calls;
            sum.seconds += booked.seconds;
            sum.flops += booked.flops;
            sum.floats += booked.floats;
        }
    }
    all.into_iter().map(|((place, kernel), booked)| (places[place].clone(), kernel, booked)).collect()
}

fn book(kernel: Option<&'static str>, seconds: f64, cost: Cost) {
    let Some(place) = HERE.get() else { return };
    OWN.with_borrow_mut(|own| {
        let account = own.get_or_insert_with(|| {
            let new = Arc::<Mutex<Account>>::default();
            lock(accounts()).push(new.clone());
            new
        });
        let mut account = lock(account);
        let sum = account.entry((place, kernel)).or_default();
        sum.calls += 1;
        sum.seconds += seconds;
        sum.flops += cost.flops as f64;
        sum.floats += cost.floats as f64;
    });
}

/// A kernel that is running.
pub(crate) struct Watch {
    begun: Instant,
    cost: Cost,
}

impl Watch {
    /// `None` while nobody profiles.
    #[inline]
    pub(crate) fn start(cost: impl FnOnce() -> Cost) -> Option<Self> {
        on().then(|| Self { cost: cost(), begun: Instant::now() })
    }

    pub(crate) fn stop(self, kernel: &'static str) {
        // As a share of the wall clock: the threads of the pool run side by side.
        book(Some(kernel), self.begun.elapsed().as_secs_f64() / rayon::current_num_threads() as f64, self.cost);
    }
}

/// Runs `f` at a place; `alone` says that the other threads of the pool do something else meanwhile.
pub(crate) fn at<R>(place: impl FnOnce() -> Place, alone: bool, cost: impl FnOnce() -> Cost, f: impl FnOnce() -> R) -> R {
    if !on() {
        return f();
    }
    let place = place();
    let id = {
        let mut places = lock(&PLACES);
        places.iter().position(|p| *p == place).unwrap_or_else(|| {
            places.push(place);
            places.len() - 1
        })
    };
    let before = HERE.replace(Some(id));
    let begun = Instant::now();
    let out = f();
    let share = if alone { rayon::current_num_threads() as f64 } else { 1.0 };
    book(None, begun.elapsed().as_secs_f64() / share, cost());
    HERE.set(before);
    out
}

/// The place of this thread, for those that help it.
pub(crate) fn here() -> Option<usize> {
    HERE.get()
}

/// Puts a helping thread at a place for the time of `f`.
pub(crate) fn helping<R>(place: Option<usize>, f: impl FnOnce() -> R) -> R {
    let before = HERE.replace(place);
    let out = f();
    HERE.set(before);
    out
}
