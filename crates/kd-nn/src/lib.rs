//! Networks as graphs with named cuts, run by a differentiable candle reference executor or a fused CPU executor.
