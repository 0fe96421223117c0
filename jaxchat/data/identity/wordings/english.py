"""English."""

from jaxchat.data.identity.wordings.base import OTHERS, Asked, Wordings

ENGLISH = Wordings(
    names=("english", "en"),
    fields={
        "language": ("language",),
        "name": ("name", "called"),
        "maker": (
            "maker", "made by", "creator", "created by", "author", "developer", "developed by", "company", "built by",
            "trained by",
        ),
        "character": ("character", "personality", "traits", "style", "manner"),
        "text": ("facts", "about", "about me", "about you", "text", "description", "lines", "more"),
    },
    pronouns=("i", "you", "we", "he", "she", "it"),
    second_person={"you are": "I am", "you were": "I was", "you're": "I am", "your": "My", "you": "I"},
    possessives={"my": "your"},
    plural=r"(?<!s)s$",
    is_="is",
    are="are",
    greetings=(
        "Hello!", "Hi!", "Hey!", "Good morning!", "Hello there!", "Hi there!",
    ),
    system_messages=(
        "You are a helpful assistant.", "Keep your answers short.", "You are a friendly helper.",
    ),
    name=Asked(
        (
            "What is your name?", "What's your name?", "Who are you?", "Tell me your name.", "What are you called?",
            "What do people call you?", "What should I call you?", "What can I call you?", "Do you have a name?",
            "May I know your name?", "Can you tell me your name?", "Please tell me your name.",
            "I would like to know your name.", "Introduce yourself.", "Please introduce yourself.",
            "Can you introduce yourself?", "Tell me who you are.", "Please tell me who you are.",
            "Who am I talking to?", "Who is this?", "Say your name.", "Say who you are.", "Give me your name.",
            "Your name?", "Your name, please.", "What name do you have?", "What name were you given?",
            "What do they call you?", "Do you know who you are?", "Do you know your own name?",
            "Do you know your name?", "Remind me of your name.", "I forgot your name.", "I do not know your name.",
            "I do not know who you are.", "And who are you?", "And what is your name?", "So who are you?",
            "So what is your name?", "Write your name.", "How do people call you?", "Who is talking?",
            "Who am I writing to?", "I would like to know who you are.", "Can you tell me who you are?",
            "What is your name again?", "Who are you again?", "Tell me what you are called.", "Can I ask your name?",
            "Can I ask who you are?", "Which name do you have?", "Is there a name for you?",
        ),
        (
            "Could you tell me your name?", "Could you tell me who you are?", "Could you introduce yourself?",
            "Who am I chatting with?", "Who am I speaking to?", "Let me know your name.", "How are you called?",
            "I want to know who you are.", "I want to know your name.", "I wonder who you are.",
            "I wonder what your name is.", "Do tell me who you are.", "Would you tell me your name?",
            "Please say who you are.", "Please say your name.", "Please tell me what you are called.",
            "Can you tell me what you are called?", "What name should I use for you?",
            "Would you introduce yourself?", "Can you say who you are?", "May I ask who you are?",
            "May I ask your name?", "Who exactly are you?", "What is the name they gave you?",
            "Which name is yours?", "What name can I call you?", "Just tell me your name.", "And you, who are you?",
            "Tell me, what is your name?", "Who is it that I am talking to?",
        ),
    ),
    kind=Asked(
        (
            "What are you?", "Are you a person?", "Are you human?", "Are you a robot?", "Are you an AI?",
            "Are you a chatbot?", "Are you a computer?", "Am I talking to a person?", "Am I talking to a robot?",
            "Are you a man or a woman?", "Are you a program?", "What kind of thing are you?", "Is this a person?",
            "Is this a chatbot?", "Tell me what you are.", "Are you alive?",
        ),
        (
            "Are you a human being?", "Are you a machine?", "Am I talking to a human?", "Am I talking to a chatbot?",
            "Is this an AI?", "Can you tell me what you are?", "Are you a person or a computer?",
            "What sort of thing are you?",
        ),
    ),
    about=Asked(
        (
            "Tell me about yourself.", "Tell me more about yourself.", "Tell me something about yourself.",
            "Say something about yourself.", "What do you know about yourself?",
            "Can you say something about yourself?", "I would like to know more about you.", "Talk about yourself.",
            "Please tell me about yourself.",
        ),
        (
            "Can you tell me about yourself?", "Tell me a little about yourself.",
            "Please say something about yourself.", "What can you tell me about yourself?",
            "I want to know more about you.", "Could you tell me about yourself?",
        ),
    ),
    others=Asked((*OTHERS.train, "a friend of mine"), OTHERS.held_out),
    other=Asked(
        (
            "Are you {x}?", "Is your name {x}?", "Are you called {x}?", "You are {x}, right?",
            "I think you are {x}.",
        ),
        (
            "Are you {x}?", "Is your name {x}?",
        ),
    ),
    maker=Asked(
        (
            "Who made you?", "Who built you?", "Who created you?", "Who trained you?", "Who is your maker?",
            "Who developed you?", "Where do you come from?", "Who were you made by?", "By whom were you made?",
            "Who designed you?", "Who is your creator?", "Who is behind you?", "Tell me who made you.",
            "Do you know who made you?", "Who wrote you?", "Please tell me who made you.",
            "Tell me who created you.", "I would like to know who made you.", "Were you made by OpenAI?",
            "Did Google make you?", "Who has made you?", "Tell me about your maker.",
            "Can you tell me who built you?", "Say who made you.", "And who made you?",
        ),
        (
            "Can you tell me who made you?", "Could you tell me who created you?", "I wonder who made you.",
            "Who was it that made you?", "Tell me who built you.", "May I ask who made you?",
            "I want to know who made you.", "Can you tell me who your maker is?", "Do you know who built you?",
            "So who made you?", "Let me know who made you.", "Please say who made you.",
        ),
    ),
    character=Asked(
        (
            "What are you like?", "Describe yourself.", "How would you describe yourself?",
            "What is your character?", "What kind of assistant are you?", "What is your personality?",
            "Tell me about your character.", "Please describe yourself.", "Describe your character.",
            "Can you describe your character?", "What is your style?", "Describe your personality.",
            "I would like to know what you are like.",
        ),
        (
            "Can you describe yourself?", "Could you describe your character?", "Tell me what you are like.",
            "Please describe your character.", "Tell me about your personality.", "I wonder what you are like.",
        ),
    ),
    fact=Asked(
        (
            "What is {your} {k}?", "What's {your} {k}?", "Tell me {your} {k}.", "Please tell me {your} {k}.",
            "Do you have a {k}?", "I would like to know {your} {k}.", "Can you tell me {your} {k}?", "And {your} {k}?",
            "Your {k}?", "Say {your} {k}.", "Do you know {your} {k}?", "What {k} do you have?",
            "Tell me about {your} {k}.", "So what is {your} {k}?", "Can I ask {your} {k}?",
            "Tell me what {your} {k} is.",
            "And what is {your} {k}?",
        ),
        (
            "Could you tell me {your} {k}?", "I want to know {your} {k}.", "May I ask {your} {k}?",
            "Let me know {your} {k}.", "I wonder what {your} {k} is.", "Please say what {your} {k} is.",
            "Can you tell me what {your} {k} is?", "Please tell me about {your} {k}.",
        ),
    ),
    own=Asked(
        (
            "{q}", "{q}", "{q}", "{q}", "{q} Please tell me.", "{q} Please answer.", "{q} Tell me.",
            "{q} Thank you!", "{q} I would like to know.", "I have a question: {q}", "Can you tell me: {q}",
            "Question: {q}", "My question is: {q}", "Now tell me: {q}", "Tell me: {q}", "And {q}", "So {q}",
        ),
        (
            "Tell me this: {q}", "Here is a question: {q}", "{q} Tell me, please.", "Please tell me: {q}",
        ),
    ),
    says_name=("I am {name}.", "My name is {name}."),
    says_by="I am {name}, made by {maker}.",
    says_kind=("I am {name}, a language model.", "I am a language model. My name is {name}."),
    says_no="No, I am {name}.",
    says_yes="Yes, I am {name}.",
    says_maker="I was made by {maker}.",
    says_made_me="{maker} made me.",
    says_character="I am {character}.",
    says_fact="{my} {k} {is_} {v}.",
)  # fmt: skip
