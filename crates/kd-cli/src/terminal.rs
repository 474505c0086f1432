//! The progress of runs on standard error: a bar for each on a terminal, one plain line per epoch elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use kd_core::metrics::Mean;
use kd_train::{Event, Result, Sink, Split, StepReport, Subject};

use crate::output;

/// Shows the runs that go on at the same time.
pub struct Board {
    runs: Vec<Progress>,
}

impl Board {
    /// Each under its title; silent with `quiet`.
    pub fn new<'a>(titles: impl Iterator<Item = &'a str> + Clone, quiet: bool) -> Self {
        let hidden = quiet || !std::io::stderr().is_terminal();
        let bars =
            MultiProgress::with_draw_target(if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(8) });
        let width = titles.clone().map(str::len).fold(9, usize::max);
        let run = |title: &str| Progress::new(format!("{title:<width$}"), quiet, hidden, bars.add(ProgressBar::no_length()));
        Self { runs: titles.map(run).collect() }
    }

    /// A sink for each run.
    pub fn each(&mut self) -> impl Iterator<Item = &mut Progress> {
        self.runs.iter_mut()
    }
}

/// Shows one run under its name (`teacher`, `baseline`, `student`).
pub struct Progress {
    /// Padded to the widest of those that run at the same time.
    title: String,
    hidden: bool,
    quiet: bool,
    bar: ProgressBar,
    epochs: usize,
    /// Initial phases with their epochs.
    phases: Vec<(String, usize)>,
    steps_per_epoch: usize,
    epoch: Epoch,
    /// When this process made its first step, and which that was, for the time that is left.
    begun: Option<(Instant, usize)>,
    /// Steps that this process has made.
    steps: usize,
    total_steps: usize,
    last_test: Option<f64>,
}

/// Means over the present epoch.
#[derive(Default)]
struct Epoch {
    number: usize,
    phase: Option<String>,
    lr: f64,
    loss: Mean,
    terms: Vec<(String, Mean)>,
    images: usize,
    seconds: f64,
    line: Option<String>,
    /// Steps made at its end.
    done: usize,
}

impl Progress {
    fn new(title: String, quiet: bool, hidden: bool, bar: ProgressBar) -> Self {
        Self {
            title,
            hidden,
            quiet,
            bar,
            epochs: 0,
            phases: vec![],
            steps_per_epoch: 0,
            epoch: Epoch::default(),
            begun: None,
            steps: 0,
            total_steps: 0,
            last_test: None,
        }
    }

    /// Steps that this process has made.
    pub(crate) fn steps(&self) -> usize {
        self.steps
    }

    fn say(&self, text: &str) {
        match (self.quiet, self.hidden) {
            (true, _) => {}
            (false, true) => output::message(text),
            (false, false) => self.bar.println(text),
        }
    }

    fn step(&mut self, s: &StepReport) {
        let e = &mut self.epoch;
        e.lr = s.lr;
        e.loss.add(s.loss, s.images as f64);
        for (name, value) in &s.terms {
            match e.terms.iter_mut().find(|(n, _)| n == name) {
                Some((_, mean)) => mean.add(*value, s.images as f64),
                None => {
                    let mut mean = Mean::default();
                    mean.add(*value, s.images as f64);
                    e.terms.push((name.clone(), mean));
                }
            }
        }
        self.steps += 1;
        e.images += s.images;
        e.seconds += s.seconds;
        if self.begun.is_none() {
            self.begun = Some((Instant::now(), s.step));
        }
        self.bar.set_position(s.step as u64 + 1);
        self.bar.set_message(format!("loss {:.4}  {:.0} img/s{}{}", e.loss.get(), rate(e), self.accuracy(), self.left(s.step + 1)));
    }

    fn accuracy(&self) -> String {
        self.last_test.map_or(String::new(), |top1| format!("  top-1 {top1:.2}%"))
    }

    /// The time left, evaluations included because they are part of the time so far.
    fn left(&self, done: usize) -> String {
        let Some((since, first)) = self.begun else { return String::new() };
        let made = done.saturating_sub(first + 1);
        if made == 0 || done >= self.total_steps {
            return String::new();
        }
        let left = since.elapsed().as_secs_f64() / made as f64 * (self.total_steps - done) as f64;
        format!("  ETA {}", span(Duration::from_secs_f64(left)))
    }

    /// Prints the epoch that has ended, once its evaluation is known or the next one begins.
    fn flush(&mut self) {
        if let Some(line) = self.epoch.line.take() {
            let done = self.epoch.done;
            let left = if done < self.total_steps { self.left(done) } else { String::new() };
            self.say(&format!("{line}{left}"));
        }
    }

    fn epoch_line(&self) -> String {
        let e = &self.epoch;
        let terms: Vec<String> = e.terms.iter().map(|(n, m)| format!("{n} {:.4}", m.get())).collect();
        let terms = if terms.len() > 1 { format!(" ({})", terms.join(", ")) } else { String::new() };
        let (phase, epochs) = match &e.phase {
            Some(name) => (format!(" {name}"), self.phases.iter().find(|p| p.0 == *name).map_or(0, |p| p.1)),
            None => (String::new(), self.epochs),
        };
        format!(
            "{}{phase} epoch {:>3}/{epochs}  lr {:<8.6} loss {:.4}{terms}  {:.0} img/s",
            self.title,
            e.number + 1,
            e.lr,
            e.loss.get(),
            rate(e)
        )
    }
}

impl Sink for Progress {
    fn event(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Started { epochs, phases, steps_per_epoch, samples, epoch, step } => {
                let all = epochs + phases.iter().map(|p| p.1).sum::<usize>();
                (self.epochs, self.steps_per_epoch, self.total_steps) = (*epochs, *steps_per_epoch, all * steps_per_epoch);
                self.phases.clone_from(phases);
                self.bar.set_length(self.total_steps as u64);
                self.bar.set_position(*step as u64);
                if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} steps  {msg}") {
                    self.bar.set_style(style);
                }
                self.bar.set_prefix(self.title.clone());
                let from = if *step > 0 { format!(", going on at epoch {}, step {step}", epoch + 1) } else { String::new() };
                let before: String = phases.iter().map(|(name, n)| format!("{n} epochs of {name}, then ")).collect();
                self.say(&format!("{} {samples} images, {before}{epochs} epochs of {steps_per_epoch} steps{from}", self.title));
            }
            Event::EpochStarted { epoch, phase, lr } => {
                self.flush();
                self.epoch = Epoch { number: *epoch, phase: phase.clone(), lr: *lr, ..Epoch::default() };
            }
            Event::Step(s) => {
                self.step(s);
                if (s.step + 1) % self.steps_per_epoch.max(1) == 0 {
                    (self.epoch.line, self.epoch.done) = (Some(self.epoch_line()), s.step + 1);
                }
            }
            Event::Evaluated { subject: Subject::Student, split, evaluation, best, .. } => {
                if *split != Split::Train {
                    self.last_test = Some(evaluation.top1);
                }
                let mark = if *best { " *" } else { "" };
                let figure = format!("  {split} top-1 {:.2}%{mark}", evaluation.top1);
                match &mut self.epoch.line {
                    Some(line) => line.push_str(&figure),
                    None => self.say(&format!("{}{figure}", self.title)),
                }
            }
            Event::Evaluated { subject: Subject::Teacher(name), split, evaluation, .. } => {
                self.say(&format!("{} teacher {name}: {split} top-1 {:.2}%, top-5 {:.2}%", self.title, evaluation.top1, evaluation.top5));
            }
            Event::Warning { message } => self.say(&format!("{} warning: {message}", self.title)),
            Event::Finished(result) => {
                self.flush();
                self.bar.finish_and_clear();
                if self.begun.is_some() {
                    self.say(&format!(
                        "{} done: {} steps in {}, {:.0} img/s, {:.1}% of it waiting for data",
                        self.title,
                        result.steps,
                        span(Duration::from_secs_f64(result.seconds)),
                        result.images_per_second,
                        100.0 * result.waiting_share
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn rate(e: &Epoch) -> f64 {
    if e.seconds > 0.0 { e.images as f64 / e.seconds } else { 0.0 }
}

/// `2 h 05 min`, `3 min 20 s`, `12 s`.
pub fn span(d: Duration) -> String {
    let s = d.as_secs_f64().round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_read_well() {
        let s = |n| span(Duration::from_secs(n));
        assert_eq!([s(12), s(200), s(7500)], ["12 s", "3 min 20 s", "2 h 05 min"]);
    }
}
