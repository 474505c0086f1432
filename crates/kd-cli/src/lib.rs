//! Knowledge distillation of image classifiers from the command line: one binary, fast on a CPU.
