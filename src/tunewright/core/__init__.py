"""What every room stands on: errors, the store, randomness, events, plugins, units."""
