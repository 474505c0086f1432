//! Image data sets, deterministic augmentation and a prefetching loader for the kd knowledge-distillation toolkit.
