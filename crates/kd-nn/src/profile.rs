//! Where the time of the fused executor goes: by network, layer, pass and kernel.
//!
//! ```
//! kd_nn::profile::start();
//! // ... runs of networks, forwards and backwards, by any thread ...
//! for entry in kd_nn::profile::stop() {
//!     assert!(entry.seconds >= 0.0);
//! }
//! ```
//!
//! One profile at a time, of the whole process. While none is being taken, a kernel checks one flag.

use crate::kernels::clock;

/// What a layer, or one of its kernels, took.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The network's name.
    pub network: String,
    /// The layer: its parameters' prefix, or what it does and its number.
    pub layer: String,
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// The kernel; `None` is the layer as a whole, its kernels and all between them.
    pub kernel: Option<&'static str>,
    /// How often it ran, counted on every thread.
    pub calls: u64,
    /// Wall time; of a kernel the threads' time divided by their number.
    pub seconds: f64,
    /// Additions and multiplications: of a kernel as it does them, of a layer as its definition has them (so more in Winograd's way).
    pub flops: f64,
    /// Bytes that were read and written, from whatever level of memory.
    pub bytes: f64,
}

/// Begins a profile.
pub fn start() {
    clock::start();
}

/// Ends it.
pub fn stop() -> Vec<Entry> {
    clock::stop()
        .into_iter()
        .map(|(place, kernel, booked)| Entry {
            network: place.network,
            layer: place.layer,
            pass: place.pass,
            kernel,
            calls: booked.calls,
            seconds: booked.seconds,
            flops: booked.flops,
            bytes: 4.0 * booked.floats,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};
    use kd_core::{Cut, Mode, Model, Rng};

    use super::*;
    use crate::{Conv, GraphBuilder, Network};

    #[test]
    fn layers_and_kernels_are_booked() {
        let mut b = GraphBuilder::new("profiled", &[16, 8, 8]);
        b.conv("body.conv", Conv::new(32, 3).pad(1));
        b.batch_norm("body.norm");
        b.relu();
        b.global_avg_pool();
        b.cut(Cut::Embedding);
        b.linear("fc", 5);
        b.cut(Cut::Logits);
        let network = Network::new(b.finish().unwrap(), DType::F32, &Device::Cpu).unwrap();
        network.init(Rng::new(1)).unwrap();
        let x = Tensor::ones((4, 16, 8, 8), DType::F32, &Device::Cpu).unwrap();
        let step = || {
            let y = network.run(&x, Cut::Input, &[Cut::Logits], Mode::BatchStats).unwrap().logits().unwrap().clone();
            crate::backward(&y.sqr().unwrap().sum_all().unwrap(), &[&network]).unwrap();
        };
        step();
        start();
        step();
        // Other tests may run at the same time.
        let found: Vec<Entry> = stop().into_iter().filter(|e| e.network == "profiled").collect();
        let of = |layer: &str, pass: &str, kernel: Option<&str>| {
            let found = found.iter().filter(|e| e.layer == layer && e.pass == pass && e.kernel == kernel).collect::<Vec<_>>();
            assert_eq!(found.len(), 1, "{layer} {pass} {kernel:?}");
            found[0]
        };
        let flops = (2 * 4 * 8 * 8 * 16 * 32 * 9) as f64;
        assert_eq!(of("body.conv", "forward", None).flops, flops);
        assert_eq!(of("fc", "backward", None).flops, 2.0 * (2 * 4 * 32 * 5) as f64);
        // A quarter of the multiplications, and what is done for it.
        assert_eq!(of("body.conv", "forward", Some("winograd products")).flops, flops / 4.0);
        assert!(of("body.norm", "backward", None).seconds > 0.0);
        for layer in found.iter().filter(|e| e.kernel.is_none()) {
            let kernels = found.iter().filter(|e| e.kernel.is_some() && e.layer == layer.layer && e.pass == layer.pass);
            assert!(kernels.map(|e| e.seconds).sum::<f64>() <= layer.seconds * 1.001, "{}", layer.layer);
        }
        start();
        assert!(stop().iter().all(|e| e.network != "profiled"));
    }
}
