"""The platform on your desk: runs jobs as Grand Challenge does, fails where it would fail (standard library only)."""
