"""Read the Parquet files of any run with pandas and DuckDB alone: python examples/read_log.py RUN

docs/log-format.md describes the columns. A summary holds sums, so a norm is sqrt(sum of squares),
and tensors, steps or ranks are pooled by adding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

if len(sys.argv) != 2:
    sys.exit("usage: python examples/read_log.py RUN    (a run folder, for example runs/quickstart)")
run = Path(sys.argv[1])

# pandas: the norm of each weight at its first and last capture
stats = pd.read_parquet(run / "stats")
weights = stats.query("kind == 'weight'").sort_values("step")
norms = weights.assign(norm=np.sqrt(weights["sum_sq"])).groupby("tensor")["norm"].agg(["first", "last"])
print("norm of each weight, first and last capture (pandas)")
print(norms.round(4).to_string(), "\n")

# DuckDB: how large an update is beside the weight it changes; about 0.001 is common
ratios = duckdb.execute(f"""
    SELECT tensor, count(*) AS captures, median(sqrt(sum_sq / ref_sum_sq)) AS update_ratio
    FROM read_parquet('{run}/stats/*.parquet')
    WHERE kind = 'update' AND ref_sum_sq > 0
    GROUP BY tensor ORDER BY update_ratio DESC
""")
print("size of an update relative to the weight, median over captures (DuckDB)")
print(ratios.df().round(6).to_string(index=False))
