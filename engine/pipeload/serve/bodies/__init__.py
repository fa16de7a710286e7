"""Requests and answers of the routes, as msgspec Structs: the OpenAPI file is made from them."""
