"""The admin API's requests and responses, each shape once."""
