"""Parts of networks: where the blocks of a transformer are, and layers that rankwise adds."""
