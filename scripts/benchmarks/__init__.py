"""What the benchmarks are made of: both ways of doing the same work, and how they are measured."""
