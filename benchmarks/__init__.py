"""Measurements of fedsea beside `transformers`, on one machine and in one run.

    python -m benchmarks.run --quick        the ratios that matter, in minutes
    python -m benchmarks.run                everything, into benchmarks/results/

Every ratio is taken pair by pair from interleaved runs, A B A B, so that a machine that slows down
slows both sides; medians are shown with their least and greatest value. Nothing passes or fails on
absolute times except the cost of the split itself, which is a difference and is stated in ms.
"""
