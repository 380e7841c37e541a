"""Commands that measure, and print JSON with the machine, the versions and a yardstick of the same run."""
