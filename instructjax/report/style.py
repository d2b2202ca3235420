"""The page's style sheet: light or dark as the reader's system is, and no font is fetched."""

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --line: #dfe3e8;
  --ink: #1c2127; --soft: #5d6773; --link: #2f74c8;
  --good: #14764d; --good-back: #dcf3e8; --bad: #a82a3f; --bad-back: #fbe3e7; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --card: #1d232b; --line: #333b45;
    --ink: #e6e9ed; --soft: #9aa5b1; --link: #6aa7f0;
    --good: #6fd6a8; --good-back: #173b2d; --bad: #f59aa9; --bad-back: #451d25; }
}
body { margin: 0 auto; max-width: 70rem; padding: 2.5rem 1.5rem 5rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
p { margin: .4rem 0 .9rem; max-width: 48rem; }
.ran { max-width: none; }
.soft, figcaption, small { color: var(--soft); }
a { color: var(--link); text-decoration: none; }
nav a { margin-right: 1.1rem; white-space: nowrap; }
figure { margin: 1.2rem 0; }
figcaption { font-size: .9rem; max-width: 48rem; }
svg { width: 100%; height: auto; color: var(--ink); }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .7rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-size: .82rem; color: var(--soft); font-weight: 600; }
.numbers td, .numbers th { text-align: right; white-space: nowrap; }
.numbers td:first-child, .numbers th:first-child { text-align: left; }
.wins { table-layout: fixed; min-width: 52rem; }
.wins td { text-align: center; line-height: 1.25; }
.wins th { text-align: center; }
.wins td:first-child, .wins th:first-child { text-align: left; width: 20%; }
.wins small { font-size: .75rem; }
.measured { white-space: nowrap; }
.measured div { display: flex; justify-content: space-between; gap: 1rem; }
.pill { display: inline-block; padding: .1rem .65rem; border-radius: 1rem;
  font-weight: 600; font-size: .85rem; white-space: nowrap; }
.yes { color: var(--good); background: var(--good-back); }
.no { color: var(--bad); background: var(--bad-back); }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .45em; }
.prompt { margin: 1.6rem 0 .5rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: .6rem; }
.answer { background: var(--card); border-radius: .5rem; padding: .6rem .8rem;
  border-left: 4px solid; }
.answer b { display: block; font-size: .8rem; }
.answer p { margin: .15rem 0 .3rem; overflow-wrap: anywhere; }
.answer small { font-size: .78rem; }
@media (max-width: 45rem) {
  .findings tr, .findings td { display: block; }
  .findings th { display: none; }
  .findings td { border: 0; padding: .2rem 0; }
  .findings tr { border-bottom: 1px solid var(--line); padding: .7rem 0; }
}
"""
