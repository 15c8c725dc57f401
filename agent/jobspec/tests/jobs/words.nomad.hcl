# The least that has every block: each comment that names one is where words.txt puts its words.
job "words" {
  # job
  group "g" {
    # group
    network {
      # network
      mode = "bridge"
      port "http" {
        # port
      }
    }
    service {
      # service
      name = "plain"
      port = "http"
      check {
        # check
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "1s"
      }
    }
    service {
      name = "mesh"
      port = "9001"
      connect {
        # connect
        sidecar_service {
          # sidecar_service
          proxy {
            # proxy
            upstreams {
              # upstreams
              destination_name = "api"
              local_bind_port  = 8080
            }
          }
        }
      }
    }
    task "t" {
      # task
      driver = "exec"
      config {
        # config
        command = "/bin/serve"
      }
      resources {
        # resources
      }
      logs {
        # logs
      }
      restart {
        # restart
      }
    }
  }
}
