//! The training loop of the kd knowledge-distillation toolkit: optimisers, durable checkpoints, exact resume, run directories, events.
