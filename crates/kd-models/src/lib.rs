//! The model zoo of the kd knowledge-distillation toolkit: image classifiers as graphs, with PyTorch parameter names.
