"""What several data sources are made of."""
