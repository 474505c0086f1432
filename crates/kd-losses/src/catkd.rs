//! `catkd`: class attention transfer, where each class is seen.
//!
//! Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, arXiv 2304.12777.
//!
//! ```text
//! A     = W F                                  the classifier at every position of the map before the average pooling, without its bias
//! n(x)  = x, or x / max(|x|, eps) over the r^2 cells of each class with `normalize`
//! value = mean over B K r^2 of (n(pool_r(A_s)) - n(pool_r(A_t)))^2
//! ```
//!
//! | symbol | tensor | shape |
//! |---|---|---|
//! | `F` | map before the average pooling: the last block | `[B,D,H,W]` |
//! | `W` | the classifier's weight; the student's is trained by this loss too | `[K,D]` |
//! | `A` | class activation maps | `[B,K,H,W]` |
//!
//! | parameter | default | range | |
//! |---|---|---|---|
//! | `resolution` | 2 | >= 1 | r |
//! | `normalize` | false | | whether each class's map is brought to length 1 |
//! | `binarize` | false | | the teacher's maps as 1 where they exceed their mean magnitude, 0 elsewhere |
//! | `eps` | 1e-12 | > 0 | |
//!
//! Term: `cat`. Beside `ce` 1; the authors' settings:
//!
//! | pair | weight | resolution | normalize |
//! |---|---|---|---|
//! | resnet56 - resnet20 | 0.7 | 2 | no |
//! | resnet110 - resnet32 | 1.8 | 2 | no |
//! | resnet32x4 - resnet8x4 | 15 | 2 | no |
//! | vgg13 - vgg8 | 4.5 | 2 | no |
//! | wrn_40_2 - wrn_16_2 | 12 | 2 | no |
//! | wrn_40_2 - wrn_40_1 | 1.5 | 2 | no |
//! | vgg13 - MobileNetV2 | 15 | 2 | yes |
//! | ResNet50 - MobileNetV2 | 40 | 2 | yes |
//! | wrn_40_2 - ShuffleV1 | 80 | 4 | yes |
//! | resnet32x4 - ShuffleV1, ShuffleV2 | 600 | 4 | yes |
//! | ImageNet R34-R18 | 0.5 | 4 | no |
//! | ImageNet R50-MobileNet | 10 | 2 | yes |
//!
//! The release converts both networks: their classifier becomes a 1x1 convolution without bias before the pooling. The maps here are the
//! same without the conversion, and the networks keep their biases. No adapter, no state. Cost `O(B D K r^2)`, negligible: both
//! steps are linear, so the maps are pooled before they meet the classifier (the teacher's after it where they are binarised). A class map
//! of zeros stays zero. The release's transfer of a part of the classes is not here.

use candle_core::Tensor;
use kd_core::{
    Cut, Error, LossTerms, Method, MethodEntry, Mode, Model, Needs, ParamDoc, ParityInputs, ParityOutput, Result, Setup, StepView,
};
use kd_nn::ops;
use serde::{Deserialize, Serialize};

use crate::features;
use crate::inputs;
use crate::registry::parse;

/// Parameters; see the [module](self).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Height and width of the compared maps, at least 1.
    pub resolution: usize,
    /// Whether each class's map is brought to length 1.
    pub normalize: bool,
    /// Whether the teacher's maps become 0 and 1.
    pub binarize: bool,
    /// The least length that a map is divided by, above 0.
    pub eps: f64,
}

impl Default for Params {
    fn default() -> Self {
        Self { resolution: 2, normalize: false, binarize: false, eps: 1e-12 }
    }
}

impl Params {
    /// Refuses values out of range, naming key, value and range.
    pub fn validate(&self) -> Result<()> {
        if self.resolution == 0 {
            return Err(Error::param("resolution", 0, "at least 1"));
        }
        inputs::positive("eps", self.eps)
    }
}

/// Class attention transfer of the activation maps `student` and `teacher`, `[B,K,H,W]`; the grids may differ, the teacher is detached.
///
/// # Errors
/// Maps that are not `[B,K,H,W]` or differ in batch or classes; parameters out of range.
pub fn catkd(student: &Tensor, teacher: &Tensor, params: &Params) -> Result<LossTerms> {
    params.validate()?;
    let [b, k, ..] = features::map("student.cam", student)?;
    features::map("teacher.cam", teacher)?;
    if teacher.dims()[..2] != [b, k] {
        return Err(Error::shape("teacher.cam", format!("[{b},{k},H,W], as the student's"), teacher.dims()));
    }
    let mut teacher = inputs::constant(teacher, student)?;
    if params.binarize {
        let mean = teacher.abs()?.flatten_from(2)?.mean_keepdim(2)?.unsqueeze(3)?;
        teacher = teacher.broadcast_gt(&mean)?.to_dtype(student.dtype())?;
    }
    let side = |cam: &Tensor| -> Result<Tensor> {
        let r = params.resolution;
        let pooled = if cam.dims()[2..] == [r, r] { cam.clone() } else { ops::adaptive_avg_pool2d(cam, [r, r])? };
        let cells = pooled.flatten_from(2)?;
        if params.normalize { Ok(ops::l2_normalize(&cells, 2, params.eps)?) } else { Ok(cells) }
    };
    Ok(LossTerms::one("cat", (side(student)? - side(&teacher)?)?.sqr()?.mean_all()?))
}

/// The activation maps of a map `[B,D,H,W]` under `classify`, which turns rows `[N,D]` into rows `[N,K]`.
fn activation_maps(map: &Tensor, classify: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (b, d, h, w) = map.dims4()?;
    let rows = map.permute((0, 2, 3, 1))?.contiguous()?.reshape((b * h * w, d))?;
    let rows = classify(&rows)?;
    let k = rows.dim(1)?;
    Ok(rows.reshape((b, h, w, k))?.permute((0, 3, 1, 2))?.contiguous()?)
}

struct CatKd {
    params: Params,
    /// The last blocks, student's and teacher's.
    blocks: Option<[Cut; 2]>,
}

impl CatKd {
    fn pooled(&self, map: &Tensor) -> Result<Tensor> {
        features::map("the last block", map)?;
        Ok(ops::adaptive_avg_pool2d(map, [self.params.resolution; 2])?)
    }
}

fn last_block(model: &dyn Model) -> Result<Cut> {
    let spec = model.spec();
    match spec.blocks.last() {
        Some(block) if block.channels == spec.embedding && block.size.iter().product::<usize>() > 0 => Ok(Cut::Block(spec.blocks.len())),
        _ => Err(Error::refused(format!("{}: `{}` does not average its last block for its linear classifier", ENTRY.name, spec.name))),
    }
}

impl Method for CatKd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn needs(&self) -> Needs {
        let [student, teacher] = self.blocks.unwrap_or([Cut::Block(1); 2]);
        Needs { student: vec![student], teacher: vec![teacher], student_model: true, teacher_model: true, ..Needs::default() }
    }

    fn prepare(&mut self, setup: &Setup<'_>) -> Result<()> {
        let teacher = setup.teacher(ENTRY.name)?;
        teacher.classifier()?;
        self.blocks = Some([last_block(setup.models.student)?, last_block(teacher)?]);
        Ok(())
    }

    fn loss(&mut self, step: &StepView<'_>) -> Result<LossTerms> {
        let [own, theirs] = self.blocks.ok_or_else(|| Error::missing(ENTRY.name, "to be prepared for its networks (`prepare`)"))?;
        let student = self.pooled(step.student()?.get(own)?)?;
        let model = step.models.student;
        let classify = |rows: &Tensor| -> Result<Tensor> {
            let logits = |rows: &Tensor| -> Result<Tensor> {
                Ok(model.run(rows, Cut::Embedding, &[Cut::Logits], Mode::Train(step.rng.named("classifier")))?.logits()?.clone())
            };
            // The bias is what the classifier makes of nothing.
            let bias = logits(&rows.narrow(0, 0, 1)?.zeros_like()?)?;
            Ok(logits(rows)?.broadcast_sub(&bias)?)
        };
        let student = activation_maps(&student, classify)?;
        let teacher = step.models.teachers.first().ok_or_else(|| Error::missing(ENTRY.name, "a teacher"))?;
        let weight = teacher.classifier()?.weight.to_device(student.device())?.to_dtype(student.dtype())?.t()?;
        let map = step.teacher()?.get(theirs)?;
        let map = if self.params.binarize { map.clone() } else { self.pooled(map)? };
        catkd(&student, &activation_maps(&map, |rows| Ok(rows.matmul(&weight)?))?, &self.params)
    }
}

fn parity(inputs: &ParityInputs) -> Result<ParityOutput> {
    Ok(catkd(inputs.get("student.cam")?, inputs.get("teacher.cam")?, &inputs.params()?)?.into())
}

/// The registry's line.
pub const ENTRY: MethodEntry = MethodEntry {
    name: "catkd",
    about: "class attention transfer: where each class is seen",
    source: "Guo et al., CVPR 2023, arXiv 2304.12777",
    year: 2023,
    parameters: &[
        ParamDoc { name: "resolution", default: "2", range: ">= 1", about: "height and width of the compared maps" },
        ParamDoc { name: "normalize", default: "false", range: "true | false", about: "whether each class's map is brought to length 1" },
        ParamDoc { name: "binarize", default: "false", range: "true | false", about: "whether the teacher's maps become 0 and 1" },
        ParamDoc { name: "eps", default: "1e-12", range: "> 0", about: "least length that a map is divided by" },
    ],
    build: |params| Ok(Box::new(CatKd { params: parse(params, Params::validate)?, blocks: None })),
    parity,
    raw_terms: true,
};
