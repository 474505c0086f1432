//! Knowledge-distillation losses and methods for candle: pure functions, trainable methods, PyTorch-checked values and gradients.
