"""Making trained models smaller or plainer: merging first."""
