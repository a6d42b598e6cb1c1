"""Statistics on arrays: intervals, correlations, the knapsack of the oracle and its controls."""
