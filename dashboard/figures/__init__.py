"""Figures as pure functions: data frames in, a Plotly figure as a plain dict out. No run, no Dash."""
