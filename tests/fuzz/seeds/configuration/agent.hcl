# one node
datacenter = "dc1"
data_dir   = "/var/lib/culvert"
server     = true
bind_addr  = "10.0.0.1"
node_meta {
  rack = "a-1"
}
ports {
  http             = 8500
  grpc             = 8502
  sidecar_min_port = 21000
  sidecar_max_port = 21255
}
connect {
  enabled   = true
  ca_config = { leaf_cert_ttl = "72h" }
}
limits { http_max_conns_per_client = 200 }
log_level = "info"
