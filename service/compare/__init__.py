"""One model, one machine, one workload: each precision in a fresh engine, and one report."""
