# The countdash demo: a counting service and a dashboard that calls it through the mesh.
#
#   culvert job run -var bin=$PWD/target/debug examples/countdash.nomad.hcl
#
# The dashboard knows nothing of the mesh: it calls http://127.0.0.1:8080 and reaches an instance of count-api.

variable "bin" {
  type        = string
  description = "Folder of the programs counter-api and counter-dashboard, as an absolute path."

  validation {
    condition     = length(split("/", var.bin)) > 1 && split("/", var.bin)[0] == ""
    error_message = "bin must be an absolute path, for example -var bin=$PWD/target/debug."
  }
}

job "countdash" {
  datacenters = ["dc1"]

  group "api" {
    network {
      mode = "bridge"
    }

    # The port is the one inside the allocation's own network: nothing is published on the host.
    service {
      name = "count-api"
      port = "9001"

      check {
        name                   = "api-health"
        type                   = "http"
        path                   = "/health"
        interval               = "2s"
        timeout                = "1s"
        success_before_passing = 2
      }

      connect {
        sidecar_service {}
      }
    }

    task "web" {
      driver = "exec"

      config {
        command = "${var.bin}/counter-api"
      }

      env {
        PORT = "9001"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }

  group "dashboard" {
    network {
      mode = "bridge"

      port "http" {
        static = 9002
        to     = 9002
      }
    }

    service {
      name = "count-dashboard"
      port = "http"

      check {
        name                   = "dashboard-health"
        type                   = "http"
        path                   = "/health"
        interval               = "2s"
        timeout                = "1s"
        success_before_passing = 2
      }

      connect {
        sidecar_service {
          proxy {
            upstreams {
              destination_name = "count-api"
              local_bind_port  = 8080
            }
          }
        }
      }
    }

    task "dashboard" {
      driver = "exec"

      config {
        command = "${var.bin}/counter-dashboard"
      }

      env {
        COUNTING_SERVICE_URL = "http://${NOMAD_UPSTREAM_ADDR_count_api}"
        PORT                 = "${NOMAD_PORT_http}"
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }
  }
}
