"""Seeded campaigns of generated calls: a documented error that names an argument, or the answer."""
