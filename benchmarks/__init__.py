"""Speed benchmarks: workloads as data, peers in environments of their own, one runner, one generated page."""
