// What a labeler's page does beyond a plain form: ranking by mouse and keyboard, drafts, undo, and the time of work.
// Without this script every page still works as a form.
"use strict";

document.body.classList.add("scripts");
const user = document.body.dataset.user || "";
const PREFIX = "draft ";

function forget(keep) {
  for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX) && !keep(key)) localStorage.removeItem(key);
}
// Nobody reads another's drafts on a shared computer.
if (user) forget((key) => key.startsWith(`${PREFIX}${user} `));
const signOut = document.querySelector("[data-sign-out]");
if (signOut) signOut.addEventListener("submit", () => forget(() => false));

const form = document.getElementById("work");
if (form) startForm();

function startForm() {
  const item = form.dataset.item, token = form.dataset.token;
  const key = `${PREFIX}${user} ${item} ${token}`;
  forget((other) => !other.startsWith(`${PREFIX}${user} ${item} `) || other === key);
  const saved = document.getElementById("saved");
  const board = document.getElementById("board") && startBoard();
  const mine = (name) => !["csrf", "token", "seconds"].includes(name);

  function values() {
    return Object.fromEntries([...new FormData(form)].filter(([name, value]) => mine(name) && value !== ""));
  }
  function fill(found) {
    for (const element of form.elements) {
      if (!element.name || !mine(element.name)) continue;
      const value = found[element.name] ?? "";
      if (element.type === "radio") element.checked = element.value === value;
      else element.value = value;
    }
    if (board) board.draw();
  }

  // Seconds in which the page is looked at and something was done within the last minute. They go on from those of the
  // draft or of the form that was sent, or from what this tab has counted before it loaded the page anew.
  let seconds = Number(form.dataset.seconds), touched = Date.now();
  try {
    const [counted, of] = JSON.parse(sessionStorage.getItem("seconds"));
    if (of === key) seconds = Math.max(seconds, counted);
  } catch { /* it has counted none */ }
  for (const kind of ["keydown", "pointerdown", "pointermove", "scroll", "input"])
    document.addEventListener(kind, () => { touched = Date.now(); }, { passive: true });
  setInterval(() => {
    if (document.hidden || Date.now() - touched >= 60000) return;
    seconds += 1;
    try { sessionStorage.setItem("seconds", JSON.stringify([seconds, key])); } catch { /* the draft has most of them */ }
  }, 1000);

  // What the network has lost is still here.
  let pending = null, timer = 0, isSending = false, isSaving = false;
  try { pending = JSON.parse(localStorage.getItem(key)); } catch { pending = null; }
  // It is newer than the server's draft if it was typed over that one; else the clock tells, which may be wrong.
  let base = Number(form.dataset.saved);
  if (pending && (pending.base >= base || pending.at > 1000 * base)) {
    fill(pending.values);
    saved.textContent = "What you had not saved is back";
    later(0);
  }

  function later(delay) { clearTimeout(timer); timer = setTimeout(save, delay); }
  function changed() {
    pending = { at: Date.now(), base, values: values() };
    try { localStorage.setItem(key, JSON.stringify(pending)); } catch { /* full or forbidden: the server's draft is left */ }
    later(800);
  }
  async function save() {
    if (!pending || isSending || isSaving) return;
    isSaving = true; // one draft at a time: it could arrive after the next one, and take its place
    const sending = pending;
    const body = new URLSearchParams({ ...sending.values, csrf: form.elements.csrf.value, token, seconds });
    try {
      // A request that hangs must not keep the next ones waiting.
      const signal = AbortSignal.timeout(10000);
      const answer = await fetch(`/items/${item}/draft`, { method: "POST", body, redirect: "error", signal });
      if (answer.ok) {
        base = (await answer.json()).saved;
        if (pending === sending) {
          pending = null;
          // Not at once: a page that is on its way may have been made before the server had this draft.
          setTimeout(() => { if (!pending) localStorage.removeItem(key); }, 5000);
        }
        saved.textContent = "Draft saved";
      } else if (answer.status >= 500) {
        saved.textContent = "The server has a problem: kept in this browser";
        later(5000);
      } else saved.textContent = answer.status === 409 ? "This form was sent already: open it again" : "Not saved: sign in again in another tab";
    } catch {
      saved.textContent = "No network: kept in this browser";
      later(5000);
    }
    isSaving = false;
    if (pending && pending !== sending) later(0);
  }
  form.addEventListener("input", changed);
  form.addEventListener("change", changed);
  window.addEventListener("online", () => later(0));

  for (const button of form.querySelectorAll("[data-rest]")) button.addEventListener("click", () => {
    const fields = button.closest(".fields").querySelectorAll("fieldset");
    for (const field of fields) if (!field.querySelector(":checked")) field.querySelector('[value="no"]').checked = true;
    changed();
  });

  form.addEventListener("submit", (event) => {
    if (isSending) { event.preventDefault(); return; }
    if (!navigator.onLine) {
      event.preventDefault();
      changed();
      saved.textContent = "No network: kept in this browser. Send when it is back.";
      return;
    }
    form.elements.seconds.value = String(Math.max(1, seconds));
    isSending = true;
    clearTimeout(timer);
    document.getElementById("send").disabled = true;
  });
  window.addEventListener("pageshow", () => { isSending = false; document.getElementById("send").disabled = false; });

  function startBoard() {
    const root = document.getElementById("board"), told = document.getElementById("told");
    const undo = document.getElementById("undo");
    const selects = [...document.querySelectorAll("#ranks select")];
    const past = [];
    const zones = ["", ...selects.map((_, i) => String(i + 1))].map((rank) => {
      const zone = document.createElement("div");
      zone.className = "zone";
      zone.dataset.rank = rank;
      zone.setAttribute("role", "group");
      const name = document.createElement("b");
      name.textContent = rank === "" ? "Not ranked" : rank === "1" ? "Rank 1 (best)" : `Rank ${rank}`;
      zone.setAttribute("aria-label", name.textContent);
      zone.append(name);
      root.append(zone);
      return zone;
    });
    const cards = new Map(selects.map((select) => {
      const card = document.createElement("button");
      card.type = "button";
      card.className = "one";
      const name = document.createElement("b"), text = document.createElement("div");
      name.textContent = `Output ${select.dataset.letter}`;
      text.className = "excerpt";
      text.dir = "auto";
      text.textContent = select.dataset.text;
      card.append(name, text);
      card.addEventListener("keydown", (event) => onKey(event, select));
      card.addEventListener("pointerdown", (event) => onDrag(event, select, card));
      return [select, card];
    }));
    // The lists are out of sight, but in the form; the cards stand for them.
    for (const select of selects) { select.tabIndex = -1; select.closest("label").setAttribute("aria-hidden", "true"); }

    function draw() {
      for (const select of selects) {
        const zone = zones.find((one) => one.dataset.rank === select.value), card = cards.get(select);
        if (card.parentNode !== zone) {
          const hadFocus = document.activeElement === card;
          zone.append(card);
          if (hadFocus) card.focus();
        }
        card.setAttribute("aria-label", `Output ${select.dataset.letter}, ${zone.getAttribute("aria-label")}`);
      }
      zones[0].hidden = selects.every((select) => select.value);
      zones[0].style.display = zones[0].hidden ? "none" : "";
      undo.disabled = !past.length;
    }
    function move(select, rank, isUndo) {
      if (select.value === rank) return;
      if (!isUndo) past.push([select, select.value]);
      select.value = rank;
      draw();
      const beside = selects.filter((one) => one !== select && one.value === rank && rank);
      told.textContent = `Output ${select.dataset.letter}: ${rank ? `rank ${rank}` : "not ranked"}` +
        (beside.length ? `, tied with ${beside.map((one) => one.dataset.letter).join(", ")}` : "");
      changed();
    }
    function back() {
      const last = past.pop();
      if (last) { move(last[0], last[1], true); cards.get(last[0]).focus(); draw(); }
    }
    undo.addEventListener("click", back);
    function onKey(event, select) {
      if (event.ctrlKey && event.key.toLowerCase() === "z") { event.preventDefault(); back(); return; }
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const most = selects.length, now = Number(select.value || 0);
      let rank = null;
      if (/^[1-9]$/.test(event.key) && Number(event.key) <= most) rank = Number(event.key);
      else if (event.key === "ArrowDown" || event.key === "ArrowRight") rank = Math.min(now + 1, most);
      else if (event.key === "ArrowUp" || event.key === "ArrowLeft") rank = now ? Math.max(now - 1, 1) : most;
      else if (event.key === "0" || event.key === "Delete") rank = "";
      else if (event.key.toLowerCase() === "u") { event.preventDefault(); back(); return; }
      if (rank === null) return;
      event.preventDefault();
      move(select, String(rank), false);
    }
    function onDrag(event, select, card) {
      if (event.button) return;
      const x = event.clientX, y = event.clientY;
      let isMoving = false;
      const over = (at) => document.elementsFromPoint(at.clientX, at.clientY).find((one) => one.classList.contains("zone"));
      function drag(at) {
        if (!isMoving && Math.hypot(at.clientX - x, at.clientY - y) < 6) return;
        isMoving = true;
        card.classList.add("moving");
        for (const zone of zones) zone.classList.toggle("over", zone === over(at));
        if (at.clientY < 40) scrollBy(0, -12);
        else if (at.clientY > innerHeight - 40) scrollBy(0, 12);
      }
      function stop(at) {
        card.removeEventListener("pointermove", drag);
        card.classList.remove("moving");
        for (const zone of zones) zone.classList.remove("over");
        const zone = isMoving && at.type === "pointerup" ? over(at) : null;
        if (zone) move(select, zone.dataset.rank, false);
        card.focus();
      }
      card.setPointerCapture(event.pointerId);
      card.addEventListener("pointermove", drag);
      card.addEventListener("pointerup", stop, { once: true });
      card.addEventListener("pointercancel", stop, { once: true });
    }
    draw();
    return { draw };
  }
}
