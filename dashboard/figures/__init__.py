"""Pure functions from data frames to Plotly figures."""
