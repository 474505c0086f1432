//! Configurations: what is read, what is refused and how.

use kd_core::{Schedule, ScheduleKind};
use kd_train::config::{DataConfig, Precision};
use kd_train::{Config, LossConfig, OptimConfig, OptimKind, RunOptions, Runs};

fn parse(text: &str, overrides: &[&str]) -> kd_train::Result<Config> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    Config::parse(text, "run.toml", &overrides, kd_losses::registry())
}

const WHOLE: &str = r#"
name = "r56-r20"
seed = 7
device = "cuda:1"
threads = 2
precision = "bf16-teacher"
[data]
source = "cifar100:DIR"
batch_size = 128
augment = ["pad-crop:4", "flip"]
train_limit = 500
label_noise = 0.1
validation = 0.05
[teacher]
model = "resnet56"
weights = "resnet56.pth"
[student]
model = "resnet20"
[[loss]]
method = "ce"
weight = 0.5
[[loss]]
method = "nkd"
warmup_epochs = 20
warmup_first_epoch = 0
gamma = 1.25
[optim]
kind = "adamw"
lr = 1e-3
[schedule]
epochs = 30
kind = "cosine"
unit = "step"
[run]
checkpoint_steps = 100
"#;

#[test]
fn everything_is_read_and_written_back() {
    let config = parse(WHOLE, &[]).unwrap();
    assert_eq!((config.seed, config.precision, config.data.batch_size), (7, Precision::Bf16Teacher, 128));
    assert_eq!(config.optim, OptimConfig { kind: OptimKind::Adamw, lr: 1e-3, ..OptimConfig::default() });
    assert_eq!(config.schedule.kind, ScheduleKind::Cosine);
    assert_eq!(config.run, RunOptions { checkpoint_steps: 100, ..RunOptions::default() });
    let nkd = &config.loss[1];
    assert_eq!((nkd.weight, nkd.warmup_epochs, nkd.warmup_first_epoch), (1.0, 20, 0));
    assert_eq!(nkd.params["gamma"], 1.25);

    let text = config.to_toml().unwrap();
    for default in ["temperature = 1", "eval_every = 1", "clip_grad_norm = 0", "baseline = false", "warmup_first_epoch = 1", "min_lr = 0"] {
        assert!(text.contains(default), "{default} is not written out:\n{text}");
    }
    let again = parse(&text, &[]).unwrap();
    assert_eq!(again, config);
    assert_eq!(again.to_toml().unwrap(), text);
}

#[test]
fn only_the_student_is_required() {
    let config = parse("[student]\nmodel = \"resnet20\"", &[]).unwrap();
    assert_eq!(config.name, "resnet20-ce");
    assert_eq!(config.loss, [LossConfig::resolved("ce", kd_losses::registry())]);
    assert_eq!((config.data, config.schedule, config.teacher.len()), (DataConfig::default(), Schedule::default(), 0));

    let config = parse("student.model = \"resnet8\"\n[teacher.train]\n[teacher]\nmodel = \"resnet20\"", &[]).unwrap();
    assert_eq!(config.name, "resnet20-resnet8-kd");
    assert_eq!(config.loss.iter().map(|l| (l.method.as_str(), l.weight)).collect::<Vec<_>>(), [("ce", 0.1), ("kd", 0.9)]);
    assert_eq!(config.loss[1].params["temperature"].as_f64(), Some(4.0));
    assert_eq!(config.teacher[0].train.as_ref().unwrap().loss, [LossConfig::resolved("ce", kd_losses::registry())]);
    assert_eq!(parse(&config.to_toml().unwrap(), &[]).unwrap(), config);
}

#[test]
fn several_teachers_are_a_list() {
    let text = r#"
        [student]
        model = "resnet20"
        [[teacher]]
        name = "a"
        model = "resnet56"
        weights = "a.pth"
        weight = 0.25
        [[teacher]]
        model = "resnet110"
        weights = "b.pth"
    "#;
    let config = parse(text, &["teacher.1.name=b"]).unwrap();
    assert_eq!(config.teacher.iter().map(|t| (t.name.as_str(), t.weight)).collect::<Vec<_>>(), [("a", 0.25), ("b", 1.0)]);
    assert_eq!(parse(&config.to_toml().unwrap(), &[]).unwrap(), config);
    let config = parse(text, &["teacher.1.name=b", "loss=[{method='kd'},{method='nd',teacher='b'}]"]).unwrap();
    assert_eq!(config.loss.iter().map(|l| l.teacher.as_deref()).collect::<Vec<_>>(), [None, Some("b")]);
    assert_eq!(parse(&config.to_toml().unwrap(), &[]).unwrap(), config);
}

#[test]
fn overrides_reach_everything() {
    let config = parse(
        WHOLE,
        &[
            "seed=3",
            "loss.1.gamma = 2",
            "loss.0.weight=0.25",
            "optim.kind=sgd",
            "data.source=digits",
            "schedule.milestones=[1, 2]",
            "loss.2.method=kd",
            "student.weights=start.pth",
        ],
    )
    .unwrap();
    assert_eq!((config.seed, config.optim.kind, config.data.source.as_str()), (3, OptimKind::Sgd, "digits"));
    assert_eq!((config.loss[1].params["gamma"].as_f64(), config.loss[0].weight), (Some(2.0), 0.25));
    assert_eq!((config.loss[2].method.as_str(), config.schedule.milestones.as_slice()), ("kd", &[1, 2][..]));
    assert_eq!(config.student.weights.as_deref(), Some("start.pth"));
    // A number that is meant as text needs quotes, as in TOML.
    assert!(parse(WHOLE, &["data.source=5"]).is_err());
    assert_eq!(parse(WHOLE, &["data.source='5'"]).unwrap().data.source, "5");
}

#[test]
fn mistakes_are_refused_with_their_place_and_a_hint() {
    let student = "[student]\nmodel = \"resnet20\"\n";
    let teacher = "[student]\nmodel = \"resnet20\"\n[teacher]\nmodel = \"resnet56\"\nweights = \"t.pth\"\n";
    let with = |text: &str| format!("{student}{text}");
    let taught = |text: &str| format!("{teacher}{text}");
    // text, overrides, where, words of the message
    let cases: Vec<(String, &[&str], &str, &[&str])> = vec![
        (String::new(), &[], "run.toml: ", &["`student`"]),
        (with("[optim]\nlrr = 0.1"), &[], "run.toml:4: ", &["`optim.lrr` is no known key", "did you mean `lr`?"]),
        (with("[optimm]\nlr = 0.1"), &[], "run.toml:3: ", &["`optimm` is no known key", "did you mean `optim`?"]),
        (with("[schedule]\nepoch = 3"), &[], "run.toml:4: ", &["`schedule.epoch`", "did you mean `epochs`?"]),
        (with("[run]\nsomething = 3"), &[], "run.toml:4: ", &["known: checkpoint_every, checkpoint_steps"]),
        (with("[optim]\n\n# a comment\nlr = \"fast\""), &[], "run.toml:6: ", &["`optim.lr`", "\"fast\"", "must be a number"]),
        (with("[data]\nbatch_size = 6.5"), &[], "run.toml:4: ", &["`data.batch_size`", "6.5", "a whole number, 0 or more"]),
        (with("[data]\nbatch_size = -6"), &[], "run.toml:4: ", &["-6", "a whole number, 0 or more"]),
        (with("[data]\nbatch_size = 0"), &[], "run.toml:4: ", &["`data.batch_size` is 0, must be at least 1"]),
        (format!("threads = 100000\n{student}"), &[], "run.toml:1: ", &["`threads` is 100000", "0 (all cores) to 1024"]),
        (with("[data]\naugment = [\"flip\",\n 3]"), &[], "run.toml:5: ", &["`data.augment.1`", "a string"]),
        (with("[data]\nvalidation = 1.0"), &[], "run.toml:4: ", &["`data.validation` is 1", "less than 1"]),
        (with("[optim]\nlr = 0"), &[], "run.toml:4: ", &["`optim.lr` is 0", "more than 0"]),
        (with("[optim]\nkind = \"adam\""), &[], "run.toml:4: ", &["`optim.kind` is \"adam\"", "sgd, adamw", "did you mean `adamw`?"]),
        (with("[schedule]\nmilestones = [3, 2]"), &[], "run.toml:4: ", &["`schedule.milestones`", "ascending"]),
        (with("[schedule]\nepochs = 3\nwarmup_epochs = 3"), &[], "run.toml:5: ", &["`schedule.warmup_epochs`", "less than"]),
        (format!("device = \"gpu\"\n{student}"), &[], "run.toml:1: ", &["`device` is gpu", "cpu, cuda:N or metal"]),
        (format!("name = \"a/b\"\n{student}"), &[], "run.toml:1: ", &["`name` is a/b", "a folder's name"]),
        (format!("seed = -1\n{student}"), &[], "run.toml:1: ", &["`seed`", "a whole number, 0 or more"]),
        (format!("seed = 99999999999999999999\n{student}"), &[], "run.toml:1: ", &["too large"]),
        ("[student]\nweights = \"x\"".to_string(), &[], "run.toml:1: ", &["`student` has no `model`"]),
        ("student = \"resnet20\"".to_string(), &[], "run.toml:1: ", &["`student`", "a section"]),
        (with("[optim]\nlr = "), &[], "run.toml:4: ", &[]),
        (with("[optim]\nlr = 0.1\nlr = 0.2"), &[], "run.toml:5: ", &["duplicate key"]),
        (with("[[loss]]\nmethod = \"cee\""), &[], "run.toml:4: ", &["`cee` is no known method", "did you mean `ce`?"]),
        (with("[[loss]]\nweight = 1.0"), &[], "run.toml:3: ", &["`loss.0` has no `method`"]),
        (with("[[loss]]\nmethod = \"ce\"\nweight = \"all\""), &[], "run.toml:5: ", &["`loss.0.weight`", "a number"]),
        (with("[[loss]]\nmethod = \"kd\""), &[], "run.toml:4: ", &["method kd needs a teacher", "[teacher]"]),
        (
            taught("[[loss]]\nmethod = \"ce\"\n[[loss]]\nmethod = \"kd\"\ntemprature = 2"),
            &[],
            "run.toml:10: ",
            &["no parameter of kd", "`temperature`"],
        ),
        (taught("[[loss]]\nmethod = \"kd\"\ntemperature = -2"), &[], "run.toml:8: ", &["temperature", "-2"]),
        (taught("[[loss]]\nmethod = \"kd\"\ntemperature = \"hot\""), &[], "run.toml:6: ", &["kd", "hot"]),
        (with("[teacher]\nmodel = \"resnet56\""), &[], "run.toml:3: ", &["either `weights` or a section `train`"]),
        (taught("[teacher.train.optim]\nlr = -1"), &[], "run.toml:3: ", &["either"]),
        (with("[teacher]\nmodel = \"a\"\n[teacher.train.optim]\nlr = -1"), &[], "run.toml:6: ", &["`teacher.0.train.optim.lr` is -1"]),
        (with("[teacher]\nmodel = \"a\"\n[[teacher.train.loss]]\nmethod = \"kd\""), &[], "run.toml:6: ", &["needs a teacher"]),
        (
            with("[[teacher]]\nmodel = \"a\"\nweights = \"x\"\n[[teacher]]\nmodel = \"a\"\nweights = \"y\""),
            &[],
            "run.toml:6: ",
            &["`teacher.1.name` is a"],
        ),
        (
            taught("[[loss]]\nmethod = \"kd\"\nteacher = \"resnet65\""),
            &[],
            "run.toml:8: ",
            &["no teacher `resnet65`", "did you mean `resnet56`?"],
        ),
        (with("[[loss]]\nmethod = \"ce\"\nteacher = \"a\""), &[], "run.toml:5: ", &["no teacher `a`"]),
        (
            with("[[teacher]]\nmodel = \"a\"\nweights = \"x\"\n[[teacher]]\nmodel = \"b\"\nweights = \"y\"\n[[loss]]\nmethod = \"nd\""),
            &[],
            "run.toml:10: ",
            &["method nd needs more than logits", "set `teacher` of this loss to one of a, b"],
        ),
        (with("[teacher]\nmodel = \"a\"\nweights = \"x\"\nweight = 0"), &[], "run.toml:3: ", &["weight 0"]),
        (with(""), &["optim.lr=-1"], "--set optim.lr=-1: ", &["`optim.lr` is -1"]),
        (with(""), &["optim.speed=1"], "--set optim.speed=1: ", &["no known key"]),
        (with(""), &["optim.lr"], "--set optim.lr: ", &["no `=`", "section.key=value"]),
        (with(""), &["student.model.name=x"], "--set student.model.name=x: ", &["no section"]),
        (with("[[loss]]\nmethod = \"ce\""), &["loss.2.weight=1"], "--set loss.2.weight=1: ", &["index from 0 to 1"]),
        (with("[[loss]]\nmethod = \"ce\""), &["loss.ce.weight=1"], "--set loss.ce.weight=1: ", &["index"]),
        (with(""), &["=1"], "--set =1: ", &["no key"]),
    ];
    for (text, overrides, at, words) in &cases {
        let error = match parse(text, overrides) {
            Ok(config) => panic!("accepted {text:?} {overrides:?}: {config:?}"),
            Err(e) => e,
        };
        let message = error.to_string();
        assert!(message.starts_with(at), "{text:?} {overrides:?}: {message}");
        assert!(error.is_usage());
        for word in *words {
            assert!(message.contains(word), "{text:?} {overrides:?}: no {word:?} in {message}");
        }
    }
}

fn parse_runs(text: &str, overrides: &[&str]) -> kd_train::Result<Runs> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    Runs::parse(text, "runs.toml", &overrides, kd_losses::registry())
}

#[test]
fn several_runs_differ_where_they_say_so() {
    let text = r#"
        seed = 3
        baseline = true
        [teacher]
        model = "resnet56"
        weights = "t.pth"
        [student]
        model = "resnet20"
        [optim]
        lr = 0.1
        momentum = 0.5
        [[loss]]
        method = "kd"
        [options]
        checkpoint_every = 7
        [[run]]
        name = "kd"
        [[run]]
        name = "dkd+small"
        student.model = "resnet8"
        optim.lr = 0.2
        run.eval_every = 2
        [[run.loss]]
        method = "dkd"
        beta = 2.0
        [run.schedule]
        epochs = 9
    "#;
    let runs = parse_runs(text, &["run.0.optim.lr=0.3", "optim.nesterov=true"]).unwrap();
    assert!(runs.side_by_side);
    assert_eq!(runs.configs.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["baseline", "kd", "dkd+small"]);
    let [baseline, kd, dkd] = &runs.configs[..] else { panic!("{runs:?}") };
    let of = |c: &Config| (c.seed, c.optim.lr, c.optim.momentum, c.optim.nesterov, c.run.checkpoint_every, c.teacher.len());
    assert_eq!(of(kd), (3, 0.3, 0.5, true, 7, 1));
    assert_eq!(of(dkd), (3, 0.2, 0.5, true, 7, 1));
    assert_eq!((dkd.student.model.as_str(), dkd.schedule.epochs, dkd.run.eval_every), ("resnet8", 9, 2));
    assert_eq!((dkd.loss.len(), dkd.loss[0].params["beta"].as_f64()), (1, Some(2.0)));
    assert_eq!(
        (baseline.loss.as_slice(), baseline.optim.lr, baseline.baseline),
        (&[LossConfig::resolved("ce", kd_losses::registry())][..], 0.3, false)
    );
    // Each is a config of its own, and all of them a file again.
    for config in &runs.configs {
        assert_eq!(parse(&config.to_toml().unwrap(), &[]).unwrap(), *config);
    }
    let written = runs.to_toml().unwrap();
    assert_eq!(parse_runs(&written, &[]).unwrap(), runs, "{written}");

    let one = parse_runs(WHOLE, &[]).unwrap();
    assert_eq!((one.side_by_side, one.configs.as_slice()), (false, &[parse(WHOLE, &[]).unwrap()][..]));
    let pair = parse_runs(WHOLE, &["baseline=true"]).unwrap();
    assert_eq!(pair.configs.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["baseline", "student"]);
    assert_eq!(parse_runs(&pair.to_toml().unwrap(), &[]).unwrap(), pair);

    for (text, at, word) in [
        ("[[run]]\nname = \"a\"\nstudent.model = \"resnet8\"\n[run.optim]\nlr = -1", "runs.toml:5: ", "`optim.lr` is -1"),
        ("student.model = \"resnet8\"\n[[run]]\nname = \"a\"\n[[run]]\nname = \"a\"", "runs.toml:5: ", "another name than any other run"),
        ("student.model = \"resnet8\"\n[[run]]\nname = \".a\"", "runs.toml:3: ", "a folder's name"),
        ("student.model = \"resnet8\"\n[[run]]\nname = \"a\"\nseed = 3", "runs.toml:4: ", "cannot differ"),
        ("student.model = \"resnet8\"\nrun = []", "runs.toml", "at least one"),
        ("[[run]]\nname = \"a\"", "runs.toml", "`student`"),
        ("[[run]]\nname = \"a\"\nrun.eval_every = 1\noptions.eval_every = 1", "runs.toml:4: ", "two names"),
    ] {
        let error = parse_runs(text, &[]).unwrap_err().to_string();
        assert!(error.starts_with(at) && error.contains(word), "{text:?}: {error}");
    }
}

#[test]
fn a_file_that_is_not_there_is_a_usage_error() {
    let error = Config::load(std::path::Path::new("no/such.toml"), &[], kd_losses::registry()).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("no/such.toml"), "{error}");
}

#[test]
fn a_warm_up_of_the_methods_own_is_not_the_common_one() {
    let teacher = "[teacher]\nmodel = \"resnet56\"\nweights = \"r56.pth\"\n[student]\nmodel = \"resnet20\"\n";
    let read = |loss: &str| parse(&format!("{teacher}[[loss]]\n{loss}\n"), &[]).unwrap();
    let own = read("method = \"kd_pp\"\nwarmup_epochs = 3");
    assert_eq!((own.loss[0].warmup_epochs, &own.loss[0].params["warmup_epochs"]), (0, &3.into()));
    assert_eq!(read("method = \"kd_pp\"\nwarmup_epochs = 0").loss[0].params["warmup_epochs"], 0);
    assert_eq!(read("method = \"kd_pp\"").loss[0].params["warmup_epochs"], 20);
    let common = read("method = \"kd\"\nwarmup_epochs = 3");
    assert_eq!(common.loss[0].warmup_epochs, 3);
    assert!(!common.loss[0].params.contains_key("warmup_epochs"));
}

#[test]
fn every_methods_defaults_are_written_and_read_back() {
    let mut read = 0;
    for method in kd_losses::registry() {
        let text = format!(
            "[teacher]\nmodel = \"resnet56\"\nweights = \"r56.pth\"\n[student]\nmodel = \"resnet20\"\n[[loss]]\nmethod = {:?}\n",
            method.name
        );
        let Ok(config) = parse(&text, &[]) else { continue };
        let written = config.to_toml().unwrap();
        assert_eq!(parse(&written, &[]).unwrap_or_else(|e| panic!("{}: {e}\n{written}", method.name)), config);
        read += 1;
    }
    assert!(read >= 17, "{read} methods can be configured without parameters");
}

#[test]
fn keys_about_data_starts_and_class_means() {
    let text = r#"
[data]
normalise = "computed"
unlabelled = "folder:MORE"
class_groups = "groups.txt"
[teacher]
model = "resnet20"
weights = "t.pth"
[teacher.class_means]
augment = true
round_decimals = 4
[student]
model = "resnet8"
weights = "s.pth"
new_head = true
"#;
    let config = parse(text, &[]).unwrap();
    assert_eq!(config.data.normalise, kd_train::config::Normalisation::Computed);
    assert_eq!((config.data.unlabelled.as_deref(), config.data.class_groups.as_deref()), (Some("folder:MORE"), Some("groups.txt")));
    assert_eq!((config.teacher[0].class_means.augment, config.teacher[0].class_means.round_decimals), (true, Some(4)));
    assert!(config.student.new_head);
    assert_eq!(parse(&config.to_toml().unwrap(), &[]).unwrap(), config);

    let refusal = |overrides: &[&str]| parse(text, overrides).unwrap_err().to_string();
    let message = refusal(&["data.normalise=measured"]);
    assert!(message.contains("--set data.normalise") && message.contains("published, computed"), "{message}");
    assert!(refusal(&["teacher.class_means.round_decimals=13"]).contains("0 to 12"));
    let message = refusal(&["teacher.class_means.file=\"m.json\""]);
    assert!(message.contains("run.toml:9") && message.contains("either read from `file`"), "{message}");
    let message = parse("[student]\nmodel = \"resnet8\"\nnew_head = true\n", &[]).unwrap_err().to_string();
    assert!(message.contains("run.toml:3") && message.contains("student.weights"), "{message}");
}

#[test]
fn every_key_has_a_place() {
    let text = "[data]\nsource = \"digits\"\naugment = [\n  \"flip\",\n  \"flop\",\n]\n[student]\nmodel = \"resnet8\"\n";
    let place = |overrides: &[String], key: &str| Config::place(text, "run.toml", overrides, key).unwrap();
    assert_eq!(place(&[], "data.augment.1"), "run.toml:5");
    assert_eq!(place(&[], "data.train_limit"), "run.toml:1");
    assert_eq!(place(&[], "schedule.epochs"), "run.toml");
    assert_eq!(place(&["data.train_limit=9".to_string()], "data.train_limit"), "--set data.train_limit=9");
}
