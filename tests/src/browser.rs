//! A real, headless browser in a test's world, steered through its driver (W3C WebDriver).

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::eventually;
use crate::http::{get, post_json};

/// Where the driver listens in every world.
const DRIVER: &str = "127.0.0.1:9515";

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    driver: Child,
    session: String,
}

impl Browser {
    /// Opens `url`.
    ///
    /// # Panics
    /// When there is no browser: `cargo xtask test` installs one.
    #[must_use]
    pub fn open(url: &str) -> Self {
        let mut command = Command::new("chromedriver");
        command.args(["--port=9515", "--silent"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let driver = command.spawn().expect("chromedriver; run the tests with `cargo xtask test`");
        eventually("the browser's driver serves", || get(DRIVER, "/status").is_ok());
        std::fs::create_dir_all("/run/browser").expect("a folder");
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--user-data-dir=/run/browser",
        ];
        let capabilities = json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}});
        let answer = post_json(DRIVER, "/session", &capabilities).expect("a browser session");
        let session = answer["value"]["sessionId"].as_str().expect("a session id").to_owned();
        let browser = Self { driver, session };
        browser.post("url", &json!({ "url": url }));
        browser
    }

    /// The text of the element with this id.
    ///
    /// # Panics
    /// When the page has none.
    #[must_use]
    pub fn text(&self, id: &str) -> String {
        let script = format!("return document.getElementById({id:?}).textContent");
        let answer = self.post("execute/sync", &json!({"script": script, "args": []}));
        answer["value"].as_str().unwrap_or_else(|| panic!("no element {id}: {answer}")).to_owned()
    }

    fn post(&self, command: &str, body: &Value) -> Value {
        let path = format!("/session/{}/{command}", self.session);
        post_json(DRIVER, &path, body).unwrap_or_else(|error| panic!("{command}: {error:#}"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The driver ends its browser when it is asked to; killed, it would leave it.
        drop(get(DRIVER, "/shutdown"));
        for _ in 0..50 {
            if matches!(self.driver.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        drop(self.driver.kill());
        drop(self.driver.wait());
    }
}
