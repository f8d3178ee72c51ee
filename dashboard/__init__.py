"""The browser side: Dash pages over a folder of runs. Imports monitor, never hooks, never torch."""
