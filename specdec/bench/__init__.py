"""Measurements that the scripts print: which parts get how much out of a pass of the target."""
