//! One file per command.

pub mod analyse;
pub mod bench;
pub mod class_means;
pub mod distill;
pub mod eval;
pub mod forward;
pub mod info;
pub mod init;
pub mod list;
pub mod loss;
pub mod methods_page;
pub mod train;

use anyhow::Result;

/// The commands.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Trains a student from a teacher; without a config, the quickstart on handwritten digits.
    Distill(distill::Distill),
    /// Trains one network on labels: a teacher or a baseline.
    Train(train::Train),
    /// Counts what a network gets right on a data set.
    Eval(eval::Eval),
    /// Writes a config file to edit.
    Init(init::Init),
    /// Measures speed: steps, networks, the loader, convolutions, the machine.
    Bench(bench::Bench),
    /// Lists models, methods and data sets.
    List(list::List),
    /// Prints a model's stages and sizes, or what a weight file holds.
    Info(info::Info),
    /// Mean teacher embedding of each class, and the teacher's mean feature norm.
    ClassMeans(class_means::ClassMeans),
    /// Looks into trained networks: feature norms, directions, the parts of KD, agreement, similarity of stages.
    Analyse(analyse::Analyse),
    /// Evaluates one loss on given tensors (value, terms, gradients), for comparing with other frameworks.
    Loss(loss::Loss),
    /// Runs one network on given images (outputs, gradients), for comparing with other frameworks.
    Forward(forward::Forward),
}

/// Runs one.
pub fn run(command: Command) -> Result<()> {
    match command {
        Command::Distill(args) => distill::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::List(args) => list::run(&args),
        Command::Info(args) => info::run(&args),
        Command::ClassMeans(args) => class_means::run(&args),
        Command::Analyse(args) => analyse::run(&args),
        Command::Loss(args) => loss::run(&args),
        Command::Forward(args) => forward::run(&args),
    }
}
