//! Differentiable tensor operations with PyTorch's conventions, composed of candle operations whose backward is right.
//!
//! Any device, f32 and f64. candle's own operation is used where its backward is right, a composition where it is missing or wrong
//! (convolution with unequal strides or paddings, pooling, bilinear resizing, ReLU's gradient at 0).

mod activation;
mod conv;
mod loss;
mod norm;
mod pool;
mod shape;

pub use activation::{gelu, hardsigmoid, hardswish, l2_normalize, leaky_relu, log_softmax, relu, relu6, sigmoid, silu, softmax};
pub use conv::{ConvArgs, conv_transpose2d, conv2d, linear};
pub use loss::{CrossEntropy, Reduction, Targets, cross_entropy, kl_div};
pub use norm::{BatchMoments, batch_moments, batch_norm, layer_norm};
pub use pool::{adaptive_avg_pool2d, avg_pool2d, interpolate_bilinear, interpolate_nearest, max_pool2d};
pub use shape::{channel_shuffle, pad_channels, subsample};
