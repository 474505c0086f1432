//! What a run tells while it goes on. The loop prints nothing: it hands events to sinks.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::files::Files;
use crate::state::RunResult;
use crate::{Error, Evaluation, Result};

/// One piece of news.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The run begins or goes on.
    Started {
        /// Epochs of the main training.
        epochs: usize,
        /// Initial phases in order, with their epochs.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        phases: Vec<(String, usize)>,
        /// Steps in an epoch.
        steps_per_epoch: usize,
        /// Training samples.
        samples: usize,
        /// The epoch at which it goes on, 0 at the beginning; of the initial phase, within one.
        epoch: usize,
        /// The global step at which it goes on, 0 at the beginning.
        step: usize,
    },
    /// An epoch begins, or goes on after a resume.
    EpochStarted {
        /// From 0; of the initial phase, within one.
        epoch: usize,
        /// The initial phase that it belongs to.
        #[serde(skip_serializing_if = "Option::is_none")]
        phase: Option<String>,
        /// The learning rate of its next step.
        lr: f64,
    },
    /// A step was made.
    Step(StepReport),
    /// A network was evaluated.
    Evaluated {
        /// Which network.
        subject: Subject,
        /// On which samples.
        split: Split,
        /// Epochs trained so far.
        epochs: usize,
        /// The figures.
        #[serde(flatten)]
        evaluation: Evaluation,
        /// Whether the student was never better, by the split that the best one is chosen on.
        best: bool,
    },
    /// Everything needed to go on from here is on the disk.
    Checkpointed {
        /// The global step.
        step: usize,
        /// The file.
        path: PathBuf,
    },
    /// Something the user should know, although the run goes on.
    Warning {
        /// In words.
        message: String,
    },
    /// The run is at its end.
    Finished(Box<RunResult>),
}

/// The figures of one step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// From 0; of the initial phase, within one.
    pub epoch: usize,
    /// The initial phase that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// The global step, from 0, initial phases included.
    pub step: usize,
    /// The learning rate used.
    pub lr: f64,
    /// The total.
    pub loss: f64,
    /// Every term as it entered the total, weight and warm-up included, by `<method>.<term>`.
    #[serde(serialize_with = "as_map")]
    pub terms: Vec<(String, f64)>,
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// Samples of the batch.
    pub images: usize,
    /// Wall time of the step, waiting included.
    pub seconds: f64,
    /// Of that, waiting for the batch.
    pub waiting: f64,
    /// The rest of it, part by part.
    #[serde(skip)]
    pub parts: StepParts,
}

/// Where the time of one step went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepParts {
    /// The teachers' outputs.
    pub teacher: f64,
    /// The student's outputs.
    pub student: f64,
    /// Loss terms and their values.
    pub loss: f64,
    /// Gradients.
    pub backward: f64,
    /// Norm, clipping and optimiser.
    pub update: f64,
}

fn as_map<S: Serializer>(terms: &[(String, f64)], s: S) -> std::result::Result<S::Ok, S::Error> {
    s.collect_map(terms.iter().map(|(name, value)| (name, value)))
}

/// Which network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The one in training.
    Student,
    /// A frozen one, by its name.
    Teacher(String),
}

/// Which samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// The samples trained on.
    Train,
    /// Samples of the training set that are held out.
    Validation,
    /// The test set.
    Test,
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Train => "training set",
            Self::Validation => "validation split",
            Self::Test => "test set",
        })
    }
}

/// Where events go: bars on a terminal, a file, a report.
pub trait Sink {
    /// Takes one event. An error ends the run; a sink that can do without an event swallows its own.
    fn event(&mut self, event: &Event) -> Result<()>;
}

/// `metrics.jsonl`: one event a line, cut back to the checkpoint when a run is resumed, so that each step is there once.
pub(crate) struct JsonLines {
    files: Arc<dyn Files>,
    path: PathBuf,
    file: File,
    len: u64,
}

impl JsonLines {
    /// Goes on after the first `len` bytes.
    pub(crate) fn open(files: Arc<dyn Files>, path: &Path, len: u64) -> Result<Self> {
        let file = files.open_append(path).map_err(|e| Error::io("opening", path, e))?;
        // A file that somebody shortened goes on from its end: it must not be filled up with zeros.
        let len = file.metadata().map_or(len, |m| len.min(m.len()));
        files.truncate(&file, len).map_err(|e| Error::io("cutting back", path, e))?;
        Ok(Self { files, path: path.to_path_buf(), file, len })
    }

    /// Waits until all lines are on the disk; returns the file's length.
    pub(crate) fn sync(&self) -> Result<u64> {
        self.files.sync(&self.file, &self.path).map_err(|e| Error::io("syncing", &self.path, e))?;
        Ok(self.len)
    }
}

impl Sink for JsonLines {
    fn event(&mut self, event: &Event) -> Result<()> {
        // In the file it is as if the run had never stopped; how it ended stands in run.json.
        match event {
            Event::Started { .. } if self.len > 0 => return Ok(()),
            Event::EpochStarted { .. } | Event::Checkpointed { .. } | Event::Finished(_) => return Ok(()),
            _ => {}
        }
        let mut line = serde_json::to_vec(event).map_err(kd_core::Error::from)?;
        line.push(b'\n');
        self.files.write(&mut self.file, &self.path, &line).map_err(|e| Error::io("writing", &self.path, e))?;
        self.len += line.len() as u64;
        Ok(())
    }
}
