"""The MCP server: the admin API's operations as tools and resources."""
