//! Reading and writing network weights for the kd knowledge-distillation toolkit: safetensors and PyTorch files, strict key mapping.
