//! The dashboard as a person sees it: a real browser, the count moving, disconnected on deny, back on allow, on both paths.

use std::time::{Duration, Instant};

use culvert_tests::{Browser, Node, NodeOptions, World, eventually};

fn count(browser: &Browser) -> u64 {
    browser.text("count").parse().unwrap_or_default()
}

/// The page counts, over connections that take `path`.
fn counts(node: &Node, browser: &Browser, path: &str) {
    let taken = || node.metric("culvert_connections_total", &["side=\"outbound\"", &format!("path=\"{path}\"")]);
    let before = taken();
    eventually("a connection takes the path", || taken() > before);
    eventually("the page says Connected", || browser.text("status") == "Connected");
    let before = count(browser);
    eventually("the count on the page grows", || count(browser) > before);
}

#[test]
fn a_browser_shows_the_count_moving_disconnected_on_deny_and_back_on_allow() {
    let world = World::new("browser");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    node.counts();
    let browser = Browser::open("http://127.0.0.1:9002/");
    for (encryption, path) in [("always", "proxied"), ("between-nodes", "direct")] {
        node.encrypt(encryption);
        counts(&node, &browser, path);
        assert_eq!(browser.text("hostname"), "countdash.api[0]");

        node.culvert(&["intention", "create", "-replace", "-deny", "count-dashboard", "count-api"]);
        eventually("the page says Disconnected", || browser.text("status") == "Disconnected");
        let (standing, since) = (count(&browser), Instant::now());
        let refusals =
            || node.metric("culvert_refusals_total", &["reason=\"intention\"", "count-dashboard => count-api"]);
        let before = refusals();
        // While the dashboard dials in vain, more than once.
        while refusals() < before + 2 || since.elapsed() < Duration::from_secs(1) {
            assert_eq!((browser.text("status").as_str(), count(&browser)), ("Disconnected", standing), "{encryption}");
            assert!(since.elapsed() < culvert_tests::PATIENCE, "the dashboard does not dial");
            std::thread::sleep(Duration::from_millis(100));
        }

        node.culvert(&["intention", "create", "-replace", "-allow", "count-dashboard", "count-api"]);
        counts(&node, &browser, path);
    }
    drop(browser);
    node.leave();
}
