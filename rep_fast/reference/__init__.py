"""The ops in plain torch: readable formulas in float64, the measure of every kernel and its stand-in."""
