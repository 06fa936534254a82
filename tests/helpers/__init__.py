"""What several tests share: oracles, checks, backends, processes."""
