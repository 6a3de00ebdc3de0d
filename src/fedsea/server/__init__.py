"""The provider's side: serves a span of blocks to many tenants, and learns nothing but rows.

`engine` owns all computation in one thread; `scheduler` and `quotas` decide without torch who is
computed next; `service` and `session` speak the protocol on the event loop; `app` puts them
together into a process.
"""
