"""What several test files share: tiny models, jobs, fake stores and hosts, failpoints."""
