"""The page at `/`: windows, sessions, cache and engines in a browser, over the admin API."""
