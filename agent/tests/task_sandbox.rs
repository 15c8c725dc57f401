//! The sandbox of the `exec` driver: what a task sees, what it may do, and what it may not.

mod task_world;
mod workload_world;

use culvert_agent::task::logs::Stream;
use culvert_agent::task::{Driver, TaskSpec};
use task_world::{fail_to_start, output, run_to_end, spec, start};
use workload_world::{eventually, in_world};

#[test]
fn a_sandboxed_task_is_nobody_without_groups_capabilities_or_a_way_to_get_any() {
    in_world("privileges", |world| async move {
        let (status, text) =
            run_to_end(&spec(&world, Driver::Exec, "id -u; id -g; id -G; cat /proc/self/status")).await;
        assert!(status.success(), "{text}");
        assert!(text.starts_with("65534\n65534\n65534\n"), "{text}");
        let value = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
            line.split_once(':').expect("a colon").1.trim().to_owned()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(value(set), "0000000000000000", "{set}");
        }
        assert_eq!(value("NoNewPrivs"), "1");
        assert_eq!(value("Groups"), "", "no supplementary groups");
        assert_eq!(value("Uid"), "65534\t65534\t65534\t65534", "nothing saved to go back to");
        // Even a set-user-ID program (util-linux's su, passwd's passwd) stays nobody.
        let script = "for file in /bin/su /usr/bin/passwd /usr/bin/chsh; do [ -u $file ] && echo found; done; \
                      su root -c 'id -u' </dev/null 2>&1; id -u";
        let (_, text) = run_to_end(&spec(&world, Driver::Exec, script)).await;
        assert!(text.contains("found") && text.ends_with("65534\n"), "{text}");
        assert!(!text.lines().any(|line| line == "0"), "{text}");
    });
}

#[test]
fn a_sandboxed_task_sees_its_own_files_and_read_only_system_directories() {
    in_world("files", |world| async move {
        let secret = world.dir.join("host-secret");
        std::fs::write(&secret, "secret of the host").expect("written");
        let script = format!(
            "ls -a / | tr '\\n' ' '; echo; \
             for dir in alloc local secrets tmp dev/shm; do echo data >/$dir/file && echo wrote $dir; done; \
             for file in /file /etc/file /usr/file /bin/file /dev/file /alloc/logs/file; do \
                 (echo data >$file) 2>/dev/null && echo WROTE $file; done; \
             cat {secret} 2>/dev/null && echo READ; ls /root /home /var /sys /run/world /boot 2>/dev/null; \
             cat /etc/shadow 2>/dev/null && echo READ; mount 2>/dev/null | grep -v ' (ro\\|/alloc\\|/local\\|/secrets\\|/tmp\\|/dev\\|/proc'; \
             echo done",
            secret = secret.display()
        );
        let spec = spec(&world, Driver::Exec, &script);
        let (status, text) = run_to_end(&spec).await;
        assert!(status.success(), "{text}");
        let mut lines = text.lines();
        let names: Vec<&str> = lines.next().expect("a listing").split_whitespace().collect();
        let allowed = [
            ".", "..", "alloc", "bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "local", "proc", "run", "sbin",
            "secrets", "tmp", "usr",
        ];
        assert!(names.iter().all(|name| allowed.contains(name)), "{names:?}");
        let rest: Vec<&str> = lines.collect();
        assert_eq!(rest, ["wrote alloc", "wrote local", "wrote secrets", "wrote tmp", "wrote dev/shm", "done"]);
        for (dir, name) in [(&spec.dirs.shared, "alloc"), (&spec.dirs.local, "local"), (&spec.dirs.secrets, "secrets")]
        {
            assert_eq!(std::fs::read_to_string(dir.join("file")).expect(name), "data\n");
        }
    });
}

#[test]
fn a_sandboxed_task_sees_only_its_own_processes() {
    in_world("processes", |world| async move {
        let script = "for dir in /proc/[0-9]*; do tr '\\0' ' ' <$dir/cmdline; echo; done; \
                      ls -l /proc/1/exe /proc/1/root 2>&1; cat /proc/1/environ /proc/kcore /proc/keys 2>/dev/null; \
                      echo 1 2>/dev/null >/proc/sys/kernel/core_pattern && echo WRO''TE; kill -9 1 2>&1; ipcs -m; echo done";
        let (status, text) = run_to_end(&spec(&world, Driver::Exec, script)).await;
        assert!(status.success(), "{text}");
        let processes: Vec<&str> =
            text.lines().filter(|line| line.contains("executor") || line.starts_with("/bin/sh")).collect();
        assert_eq!(processes.len(), 2, "its init and itself: {text}");
        assert!(!text.contains("WROTE") && text.ends_with("done\n"), "{text}");
        assert!(!text.contains("/proc/1/root ->") && !text.contains("/proc/1/exe ->"), "init is out of reach: {text}");
    });
}

#[test]
fn a_sandboxed_task_cannot_mount_trace_or_leave() {
    in_world("escape", |world| async move {
        // Every attempt that works prints ESCAPED.
        let attempts = "mount -t tmpfs none /tmp; mount -o remount,rw /usr; mount --bind /etc /local; umount /etc; \
             chroot /usr /bin/true; mknod /tmp/disk b 8 0; nsenter -t 1 -m true; nsenter -t 1 -n true; \
             unshare -n true; unshare -m true; setpriv --reuid 0 true; setpriv --inh-caps +all true; \
             ip link set lo down; nft list ruleset; ip netns add x; hostname other; date -s 2030-01-01; \
             chown 0 /local; kill -0 1; dmesg; ls /proc/1/root/; ls /proc/1/cwd/; cat /proc/1/mem";
        let script: String = attempts
            .split(';')
            .map(|attempt| format!("{attempt} >/dev/null 2>&1 && echo \"ESCAPED: {}\"\n", attempt.trim()))
            .collect();
        let script = format!("PATH=$PATH:/usr/sbin:/sbin\n{script}echo done");
        let (status, text) = run_to_end(&spec(&world, Driver::Exec, &script)).await;
        assert!(status.success(), "{text}");
        // Signal 0 to init is allowed: it is the task's own user by then, and has nothing to give.
        let escaped: Vec<&str> = text.lines().filter(|line| *line != "done" && !line.contains("kill -0 1")).collect();
        assert_eq!(escaped, [] as [&str; 0]);
        // The same user in another sandbox is out of sight: no pid, no file, no shared memory.
        let other = spec(&world, Driver::Exec, "echo precious >/local/file; exec sleep 1000");
        let task = start(&other).await;
        eventually("the other one runs", async || other.dirs.local.join("file").exists()).await;
        let look = format!("ls {} 2>&1; ls /proc | grep -c '^[0-9]'", other.dirs.local.display());
        let (_, text) = run_to_end(&spec(&world, Driver::Exec, &look)).await;
        assert!(!text.contains("file\n") && text.contains("No such file"), "{text}");
        task.kill(other.kill_signal, other.kill_timeout).await.expect("ended");
    });
}

#[test]
fn a_user_namespace_gives_a_sandboxed_task_nothing_of_the_host() {
    in_world("userns", |world| async move {
        // Where the host lets anybody make user namespaces, root in one still owns nothing outside.
        let script = "unshare -U -r -m sh -c 'echo inside $(id -u); \
                          mount -o remount,rw,bind /usr && echo ESCAPED remount; \
                          mount -o remount,rw /etc && echo ESCAPED remount; \
                          umount /etc && echo ESCAPED umount; umount /proc/sys && echo ESCAPED unmask; \
                          touch /usr/file && echo ESCAPED write; cat /proc/kcore | head -c 1 | grep -q . && echo ESCAPED kcore; \
                          cat /etc/shadow && echo ESCAPED read; ip link set eth0 down && echo ESCAPED net; \
                          nft flush ruleset && echo ESCAPED nft' 2>/dev/null; echo done";
        let mut spec = spec(&world, Driver::Exec, script);
        let network = culvert_agent::workload::Network::open(world.settings()).await.expect("opened");
        spec.netns = Some(network.create(&spec.alloc_id).await.expect("created").netns);
        let (_, text) = run_to_end(&spec).await;
        if text == "done\n" {
            // Refused before anything was tried: nothing is shown.
            assert!(
                std::env::var_os("CI").is_none(),
                "this host lets nobody make user namespaces, and CI must not skip it"
            );
            #[allow(clippy::print_stderr, reason = "a skip must be seen")]
            {
                eprintln!("SKIPPED: this host lets nobody make user namespaces");
            }
            return;
        }
        assert_eq!(text, "inside 0\ndone\n");
    });
}

#[test]
fn a_program_outside_the_system_directories_appears_alone_at_its_own_path() {
    in_world("command", |world| async move {
        let place = std::path::Path::new("/var/culvert-test-command");
        workload_world::run("mkdir", &["-p", "/var/culvert-test-command"]);
        // Private to this world: the host's /var is not touched.
        workload_world::run("mount", &["-t", "tmpfs", "none", "/var/culvert-test-command"]);
        std::fs::write(place.join("program"), "#!/bin/sh\nls /var/*; echo x >$0 || echo read-only\n").expect("written");
        std::fs::write(place.join("neighbour"), "secret").expect("written");
        std::fs::set_permissions(place.join("program"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("set");
        let mut own = spec(&world, Driver::Exec, "");
        (own.command, own.args) = (place.join("program").display().to_string(), Vec::new());
        let (status, text) = run_to_end(&own).await;
        assert!(status.success(), "{text}{}", output(&own, Stream::Stderr));
        assert_eq!(text, "program\nread-only\n");
        for bad in
            ["/var/culvert-test-command/../culvert-test-command/program", "/var/culvert-test-command", "/proc/1/exe/x"]
        {
            let error = fail_to_start(&TaskSpec { command: bad.into(), ..own.clone() }).await.to_string();
            assert!(error.starts_with("failed to launch command with executor: file "), "{error}");
        }
        workload_world::run("umount", &["/var/culvert-test-command"]);
        workload_world::run("rmdir", &["/var/culvert-test-command"]);
    });
}

#[test]
fn a_task_cannot_redirect_what_the_executor_writes() {
    in_world("links", |world| async move {
        let victim = world.dir.join("victim");
        std::fs::write(&victim, "untouched").expect("written");
        let script = format!(
            "cd /alloc; ln -sf {victim} logs/web.stdout.1; rm -rf logs; mv logs moved; rm -f logs/*; ln -s {victim} logs; \
             i=0; while [ $i -lt 30000 ]; do echo 'a line of some length to make the executor begin another file'; i=$((i+1)); done",
            victim = victim.display()
        );
        let mut spec = spec(&world, Driver::Exec, &script);
        spec.logs.max_file_size_mb = 1;
        let (_, text) = run_to_end(&spec).await;
        assert_eq!(text.lines().count(), 30_000);
        assert_eq!(std::fs::read_to_string(&victim).expect("read"), "untouched");
        assert!(!spec.dirs.shared.join("moved").exists());
    });
}

#[test]
fn standard_devices_work_in_a_sandbox() {
    in_world("devices", |world| async move {
        let script = "head -c 8 /dev/urandom | wc -c; echo x >/dev/null && echo null; head -c 3 /dev/zero | wc -c; \
                      echo out >/dev/stdout; (echo x >/dev/full) 2>/dev/null || echo full; ls /dev/pts /dev/fd/ >/dev/null && echo dirs; \
                      ls /dev | grep -c 'vda\\|sda\\|mem\\|kmsg'";
        let (_, text) = run_to_end(&spec(&world, Driver::Exec, script)).await;
        assert_eq!(text, "8\nnull\n3\nout\nfull\ndirs\n0\n");
    });
}
