"""How pictures look, and the heat map of ranks: for the report, and for what a run tells its reporters."""
