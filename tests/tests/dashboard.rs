//! The dashboard as a person sees it: a real browser, the count moving, disconnected on deny, back on allow.

use culvert_tests::{Browser, Node, NodeOptions, World, eventually};

fn count(browser: &Browser) -> u64 {
    browser.text("count").parse().unwrap_or_default()
}

#[test]
fn a_browser_shows_the_count_moving_disconnected_on_deny_and_back_on_allow() {
    let world = World::new("browser");
    let mut node = Node::start(&world, NodeOptions::default());
    node.run_countdash();
    node.counts();
    let browser = Browser::open("http://127.0.0.1:9002/");
    eventually("the page says Connected", || browser.text("status") == "Connected");
    let before = count(&browser);
    eventually("the count on the page grows", || count(&browser) > before);
    assert_eq!(browser.text("hostname"), "countdash.api[0]");

    node.culvert(&["intention", "create", "-deny", "count-dashboard", "count-api"]);
    eventually("the page says Disconnected", || browser.text("status") == "Disconnected");

    node.culvert(&["intention", "create", "-replace", "-allow", "count-dashboard", "count-api"]);
    eventually("the page says Connected again", || browser.text("status") == "Connected");
    let before = count(&browser);
    eventually("the count on the page grows again", || count(&browser) > before);
    drop(browser);
    node.leave();
}
