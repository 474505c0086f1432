//! `cargo xtask bench`: kd and PyTorch on the same machine, taking turns.
//!
//! Each round runs a block of distillation steps of `kd-cli bench step` and of every mode of PyTorch (`xtask/peer/torch_kd.py`), one after the
//! other and never two at a time, so that a busy hour falls on all alike. Rates are medians over the rounds, ratios medians of the rounds'
//! ratios. A network is compared only when both sides count the same multiply-adds.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::workspace::{kd_cli, output, root};

/// Compares the speed of training steps with PyTorch's.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --torch venv/bin/python --convs\n  \
    cargo xtask bench --torch venv/bin/python --pairs resnet56:resnet20 --rounds 9 --json")]
pub(crate) struct Args {
    /// A Python that can import torch; without it kd runs alone.
    #[arg(long, value_name = "PYTHON")]
    torch: Option<PathBuf>,
    /// Teacher and student, as many as wanted.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "TEACHER:STUDENT",
        default_value = "resnet56:resnet20,resnet32x4:resnet8x4,\
        wrn_40_2:wrn_16_2,vgg13:vgg8,vgg13:MobileNetV2,resnet32x4:ShuffleV2"
    )]
    pairs: Vec<String>,
    /// What PyTorch runs: eager, channels_last, compile, bf16, bf16_compile, teacher_bf16.
    #[arg(long, value_delimiter = ',', default_value = "channels_last,compile,bf16_compile")]
    modes: Vec<String>,
    /// kd's precisions.
    #[arg(long, value_delimiter = ',', default_value = "fast")]
    precisions: Vec<String>,
    /// Images of a batch.
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Height and width of the images.
    #[arg(long, default_value_t = 32)]
    size: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Turns of each side.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of a turn.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Convolutions alone instead of steps.
    #[arg(long)]
    convs: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Shapes of the pairs' convolutions: input, output, kernel, stride, groups, size.
const SHAPES: &str = "16,16,3,1,1,32 32,32,3,1,1,32 32,32,3,1,1,16 64,64,3,1,1,32 64,64,3,1,1,16 64,64,3,1,1,8 128,128,3,1,1,16 \
    128,128,3,1,1,8 256,256,3,1,1,8 512,512,3,1,1,4 3,16,3,1,1,32 16,32,3,2,1,32 32,64,3,2,1,16 64,128,3,2,1,32 128,256,3,2,1,16 \
    16,32,1,2,1,32 58,58,1,1,1,16 116,116,1,1,1,8 464,1024,1,1,1,4 16,96,1,1,1,16 96,16,1,1,1,16 96,96,3,1,96,16 192,192,3,1,192,8 \
    144,144,3,2,144,16 240,240,3,1,240,4";

/// Names that the two sides spell differently.
const SPELT: &[(&str, &str)] =
    &[("MobileNetV2", "mobilenetv2"), ("ShuffleV2", "shufflenetv2"), ("imagenet_resnet18", "resnet18"), ("imagenet_resnet34", "resnet34")];

pub(crate) fn run(args: &Args) -> Result<()> {
    let kd = kd_cli()?;
    let machine = from_kd(&kd, &["machine", "--threads", &args.threads.to_string()])?;
    if !args.json {
        let number = |key: &str| machine[key].as_f64().unwrap_or(f64::NAN);
        println!("{}, {} threads, kernels {}", text(&machine["cpu"]), args.threads, text(&machine["level"]));
        let (fma, read, copy) = (number("fma_gflop_s"), number("read_gb_s"), number("copy_gb_s"));
        println!("limits: {fma:.0} GFLOP/s of multiply-adds, memory {read:.1} GB/s read, {copy:.1} GB/s copied");
    }
    let found = if args.convs { convs(args, &kd)? } else { args.pairs.iter().map(|pair| steps(args, &kd, pair)).collect::<Result<_>>()? };
    if args.json {
        let what = if args.convs { "convs" } else { "pairs" };
        println!("{}", serde_json::to_string_pretty(&json!({"machine": machine, "batch": args.batch, "size": args.size, what: found}))?);
    }
    Ok(())
}

fn from_kd(kd: &Path, args: &[&str]) -> Result<Value> {
    let text = output(Command::new(kd).arg("bench").args(args).arg("--json"))?;
    Ok(serde_json::from_str(&text)?)
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToString::to_string)
}

fn peer_script() -> PathBuf {
    root().join("xtask").join("peer").join("torch_kd.py")
}

/// A PyTorch process that waits for its turns.
struct Peer {
    mode: String,
    ready: Value,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(args: &Args, python: &Path, teacher: &str, student: &str, mode: &str) -> Result<Self> {
        let spell = |name: &str| SPELT.iter().find(|s| s.0 == name).map_or(name, |s| s.1).to_string();
        let mut command = Command::new(python);
        command.arg(peer_script()).args(["--threads", &args.threads.to_string(), "--batch", &args.batch.to_string(), "step"]);
        command.args(["--teacher", &spell(teacher), "--student", &spell(student), "--mode", mode, "--size", &args.size.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("{} cannot be started", python.display()))?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut peer = Self { mode: mode.to_string(), ready: Value::Null, child, input, output };
        peer.ready = peer.line()?;
        Ok(peer)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("PyTorch, mode {}, ended without an answer; run {} by hand to see why", self.mode, peer_script().display());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn block(&mut self, seconds: f64) -> Result<Value> {
        writeln!(self.input, "block {seconds}")?;
        self.input.flush()?;
        self.line()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends with its standard input; this is for one that hangs.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A side of the comparison, and its rounds.
struct Side {
    name: String,
    rounds: Vec<Value>,
}

impl Side {
    fn rate(&self, round: usize) -> f64 {
        self.rounds[round]["img_s"].as_f64().unwrap_or(f64::NAN)
    }

    fn median(&self) -> f64 {
        median((0..self.rounds.len()).map(|r| self.rate(r)).collect())
    }

    /// The round whose rate is the median, or next to it.
    fn typical(&self) -> &Value {
        let median = self.median();
        let distance = |v: &Value| (v["img_s"].as_f64().unwrap_or(f64::NAN) - median).abs();
        self.rounds.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(&Value::Null)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

#[allow(clippy::print_stderr, reason = "what is left out belongs there")]
fn steps(args: &Args, kd: &Path, pair: &str) -> Result<Value> {
    let (teacher, student) = pair.split_once(':').with_context(|| format!("--pairs {pair}: expected TEACHER:STUDENT"))?;
    let mut peers = vec![];
    for mode in args.torch.iter().flat_map(|_| &args.modes) {
        let python = args.torch.as_deref().unwrap_or(Path::new("python3"));
        match Peer::start(args, python, teacher, student, mode) {
            Ok(peer) => peers.push(peer),
            // A mode that a machine lacks (torch.compile needs a C++ compiler) is no reason to give up the others.
            Err(e) => eprintln!("{pair}: left out: {e:#}"),
        }
    }
    let mut sides: Vec<Side> = args.precisions.iter().map(|p| Side { name: format!("kd {p}"), rounds: vec![] }).collect();
    sides.extend(peers.iter().map(|p| Side { name: format!("torch {}", p.mode), rounds: vec![] }));
    let (batch, size, threads, seconds) =
        (args.batch.to_string(), args.size.to_string(), args.threads.to_string(), args.seconds.to_string());
    for _ in 0..args.rounds.max(1) {
        for (precision, side) in args.precisions.iter().zip(&mut sides) {
            let pair = ["step", "--teacher", teacher, "--student", student, "--batch", &batch, "--size", &size];
            let how = ["--threads", &threads, "--seconds", &seconds, "--precision", precision];
            side.rounds.push(from_kd(kd, &[&pair[..], &how[..]].concat())?);
        }
        for (peer, side) in peers.iter_mut().zip(&mut sides[args.precisions.len()..]) {
            side.rounds.push(peer.block(args.seconds)?);
        }
    }
    let own = &sides[0].rounds[0]["macs"];
    if let Some(peer) = peers.iter().find(|p| p.ready["macs"] != *own) {
        bail!("{pair}: the networks differ: kd counts {own} multiply-adds, PyTorch {}", peer.ready["macs"]);
    }
    // The fastest f32 mode by its median.
    let f32 = |s: &&Side| s.name.starts_with("torch") && !s.name.contains("bf16");
    let best = sides.iter().filter(f32).max_by(|a, b| a.median().total_cmp(&b.median()));
    let ratio = |side: &Side, to: &Side| median((0..side.rounds.len()).map(|r| side.rate(r) / to.rate(r)).collect());
    let rows: Vec<Value> = sides
        .iter()
        .map(|s| {
            json!({
                "side": s.name, "img_s": s.median(), "ratio_to_best_f32": best.map(|b| ratio(s, b)), "ms": s.typical()["ms"],
                "rounds": (0..s.rounds.len()).map(|r| s.rate(r)).collect::<Vec<_>>(),
                "peak_memory": s.rounds.last().map(|r| &r["peak_memory"]),
            })
        })
        .collect();
    if !args.json {
        println!("\n{teacher} -> {student}, batch {}, {}x{}", args.batch, args.size, args.size);
        for row in &rows {
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            let parts: Vec<String> = row["ms"]
                .as_object()
                .iter()
                .flat_map(|o| o.iter())
                .map(|(k, v)| format!("{k} {:.1}", v.as_f64().unwrap_or(f64::NAN)))
                .collect();
            println!(
                "  {:<20} {:>7.1} img/s  {:>5.2} x best f32  {:>5.0} MB  ms: {}",
                text(&row["side"]),
                number("img_s"),
                number("ratio_to_best_f32"),
                number("peak_memory") / 1e6,
                parts.join(", ")
            );
        }
    }
    Ok(json!({"teacher": teacher, "student": student, "threads": args.threads, "sides": rows}))
}

/// GFLOP/s of both sides in the three directions, and the ratios.
fn convs(args: &Args, kd: &Path) -> Result<Vec<Value>> {
    let shapes: Vec<&str> = SHAPES.split_whitespace().collect();
    let (threads, batch) = (args.threads.to_string(), args.batch.to_string());
    let directions = ["fwd", "bwd_x", "bwd_w"];
    if !args.json {
        println!("\nGFLOP/s, counted as direct convolution (kd / PyTorch = ratio): forward, input gradient, weight gradient");
    }
    let mut found = vec![];
    for shape in shapes {
        let mut rounds: Vec<[Value; 2]> = vec![];
        for _ in 0..args.rounds.max(1) {
            let own = from_kd(kd, &["conv", shape, "--threads", &threads, "--batch", &batch])?[0].clone();
            let other = match &args.torch {
                None => Value::Null,
                Some(python) => {
                    let mut command = Command::new(python);
                    command.arg(peer_script()).args(["--threads", &threads, "--batch", &batch, "convs", shape]);
                    serde_json::from_str::<Value>(&output(&mut command)?)?[0].clone()
                }
            };
            rounds.push([own, other]);
        }
        let rates = |side: usize, key: &str| median(rounds.iter().filter_map(|r| r[side][key].as_f64()).collect());
        let row: serde_json::Map<String, Value> = directions
            .iter()
            .map(|key| (key.to_string(), json!({"kd": rates(0, key), "torch": rates(1, key), "ratio": rates(0, key) / rates(1, key)})))
            .collect();
        if !args.json {
            let cell = |key: &&str| format!("{:>6.0} / {:>6.0} = {:>5.2}", rates(0, key), rates(1, key), rates(0, key) / rates(1, key));
            println!("  {shape:<18} {}", directions.iter().map(cell).collect::<Vec<_>>().join("   "));
        }
        found.push(json!({"shape": shape, "directions": row}));
    }
    Ok(found)
}
