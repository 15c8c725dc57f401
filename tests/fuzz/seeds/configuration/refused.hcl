node_name = <<-EOF
    one\u00e9
  EOF
services = [ { name = "web" port = 80 }, { "name" = "${x}" } ] /* c */ // d
