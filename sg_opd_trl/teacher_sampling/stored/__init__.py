"""Teacher rollouts that are kept between runs."""
