//! Block-wise logit distillation (Block-KD) with stepping-stone networks for candle.
