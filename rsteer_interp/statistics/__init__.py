"""What stands beside a number: intervals over clusters, draws of a null, paired tests, random rotations. No model here."""
